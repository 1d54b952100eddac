"""KV-cache codecs: how keys and values are kept. Each file holds one final `KvCodec`."""

from jquant.kv.base import KvCodec as KvCodec
from jquant.kv.base import LayerCache as LayerCache
from jquant.kv.base import Rope as Rope
from jquant.kv.exact import ExactCache as ExactCache
from jquant.kv.exact import ExactKv as ExactKv
