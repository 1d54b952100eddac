"""KV-cache codecs: how keys and values are kept. Each file holds one way, and its final `KvCodec`s."""

from jquant.kv.base import KvCodec as KvCodec
from jquant.kv.base import LayerCache as LayerCache
from jquant.kv.base import Prompt as Prompt
from jquant.kv.base import Rope as Rope
from jquant.kv.exact import ExactCache as ExactCache
from jquant.kv.exact import ExactKv as ExactKv
from jquant.kv.kivi import Kivi as Kivi
from jquant.kv.kivi import KiviCache as KiviCache
from jquant.kv.per_token import PerTokenCache as PerTokenCache
from jquant.kv.per_token import PerTokenKv as PerTokenKv
from jquant.kv.prompt import PromptView as PromptView
from jquant.kv.prompt import view_chunk as view_chunk
from jquant.kv.prompt import view_prompt as view_prompt
from jquant.kv.razor import DynamicRazorKv as DynamicRazorKv
from jquant.kv.razor import RazorCache as RazorCache
from jquant.kv.razor import RazorKv as RazorKv
from jquant.kv.razor import fit_scale as fit_scale
from jquant.kv.vectors import VectorFormat as VectorFormat
from jquant.kv.vectors import Vectors as Vectors
from jquant.kv.vectors import code_vectors as code_vectors
from jquant.kv.vectors import decode_vectors as decode_vectors
from jquant.kv.vectors import write as write
