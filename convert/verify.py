"""Is a folder what its reader wants? Files, names, dtypes, shapes and numbers; then what each reader alone asks.

The rules are those of transformers 5.23 with compressed-tensors 0.20 and of GPTQModel 7.7, which `tests/interop` runs,
and of vLLM 0.33 as its source has them, which is not run here; each is one line with its reason.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from convert.base import Source
from convert.compressed_tensors import CompressedScheme
from convert.folder import open_folder
from convert.gptq import GptqScheme
from convert.huggingface import check_source, read_array
from convert.names import hf_name
from convert.packed import PackedScheme
from convert.quantized import SECTION, linear_name, linear_shapes, read_linear
from convert.refusals import Consumer
from convert.shards import INDEX
from jquant.activations import PerToken
from jquant.errors import ConversionError
from jquant.models import LlamaConfig, build

_WEIGHT_KEYS: Final = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
_FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # vLLM makes one linear of each
_MARLIN_GROUPS: Final = (None, 32, 64, 128)
_MARLIN_INPUTS: Final = 128  # its tiles
_MARLIN_OUTPUTS: Final = 64
_FAST_BITS: Final = (4, 8)


@dataclass(frozen=True)
class Verified:
    """What was found in a folder that a reader can read.

    Attributes:
      consumer: the reader.
      tensors: how many tensors were read.
      packed: how many linears are packed.
      notes: what its user should know.
    """

    consumer: Consumer
    tensors: int
    packed: int
    notes: tuple[str, ...]


def verify_folder(folder: Path, consumer: Consumer) -> Verified:
    """Reads a Hugging Face folder whole and checks it for a reader.

    Args:
      folder: the folder.
      consumer: who shall read it.

    Returns:
      What was found.

    Raises:
      ConversionError: a file is damaged, or the reader could not read the folder or would read other numbers; all
        reasons are listed.
    """
    source = open_folder(folder)
    config, packing = check_source(source)
    problems = [*_of_files(folder, source), *_of_reader(consumer, source, packing)]
    if problems:
        raise ConversionError(f"{folder} is not what {consumer} reads:\n  " + "\n  ".join(problems))
    _read_all(source, config, packing)
    return Verified(consumer, len(source.headers), len(packing), tuple(_notes(consumer, source, config, packing)))


def _read_all(source: Source, config: LlamaConfig, packing: Mapping[str, PackedScheme]) -> None:
    shapes = linear_shapes(config)

    def read(node: str, shape: tuple[int, ...]) -> None:
        path = node.removesuffix(".kernel")
        if path in packing:
            read_linear(source, path, packing[path], shapes[path])
        else:
            read_array(source, node)

    build(config, read)


def _of_files(folder: Path, source: Source) -> Iterator[str]:
    for file in sorted(set(source.files.values())):
        with safe_open(file, framework="numpy") as tensors:
            if (tensors.metadata() or {}).get("format") != "pt":
                yield f"{file.name}: its metadata has no format: pt, without which transformers reads nothing"
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        found = {name: file.name for name, file in source.files.items()}
        wrong = sorted(name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name))
        if wrong:
            yield f"{INDEX}: {len(wrong)} tensors are not where it says, such as {wrong[0]}"


def _of_reader(consumer: Consumer, source: Source, packing: Mapping[str, PackedScheme]) -> Iterator[str]:
    section = source.config.get(SECTION)
    if section is None:
        return
    method = section["quant_method"]
    if method == "compressed-tensors":
        if consumer == "gptqmodel":
            yield "it reads GPTQ and AWQ, not compressed-tensors"
        yield from _of_compressed(section)
        schemes = {path: scheme for path, scheme in packing.items() if isinstance(scheme, CompressedScheme)}
        yield from _of_schemes(schemes) if consumer == "vllm" else _of_zeros(schemes)
    if method == "gptq":
        yield from _of_gptq(consumer, section, packing)


def _of_compressed(section: Mapping[str, Any]) -> Iterator[str]:
    if section.get("quantization_status") != "compressed":
        yield "quantization_status is not 'compressed': transformers would build linears that are not packed"
    for name, group in section["config_groups"].items():
        described = [group["weights"], group.get("input_activations") or {}]
        surplus = sorted({key for part in described for key in part} - _WEIGHT_KEYS)
        if surplus:
            yield f"{name} has {', '.join(surplus)}, which older compressed-tensors refuse or newer have removed"
        if (group.get("input_activations") is not None) and group.get("format") is None:
            yield f"{name} has no format of its own: readers infer int-quantized where activations are quantized"


def _of_zeros(schemes: Mapping[str, CompressedScheme]) -> Iterator[str]:
    """Yields what is lost as transformers dequantizes asymmetric packed weights while it reads them."""
    kinds = set(schemes.values())
    if not any(_packs_zeros(kind) for kind in kinds):
        return
    alone = "transformers reads asymmetric packed weights with dequantize=True alone"
    if len(kinds) > 1:
        yield f"{alone}, which takes the first group of the configuration for all linears; quantize all in one way"
    if any(kind.activations is not None for kind in kinds):
        yield f"{alone}, which leaves activations exact; quantize weights on a symmetric grid"


def _of_schemes(schemes: Mapping[str, CompressedScheme]) -> Iterator[str]:
    for path, scheme in schemes.items():
        if scheme.layout == "int-quantized" and scheme.format.symmetry == "asymmetric":
            yield f"{linear_name(path)}: vLLM's int-quantized weights are symmetric"
        dynamic = isinstance(scheme.activations, PerToken) and scheme.activations.symmetry != "asymmetric"
        if scheme.layout == "pack-quantized" and scheme.activations is not None and not dynamic:
            yield f"{linear_name(path)}: vLLM takes packed weights with dynamic symmetric activations or none"
    parents = dict.fromkeys(path.rpartition(".")[0] for path in schemes)
    for parent in parents:
        for fused in _FUSED:
            parts = {schemes.get(f"{parent}.{name}") for name in fused}
            if len(parts) > 1 and any(f"{parent}.{name}" in schemes for name in fused):
                yield f"{parent}: vLLM fuses {', '.join(fused)}, which must be quantized alike"


def _of_gptq(consumer: Consumer, section: Mapping[str, Any], packing: Mapping[str, PackedScheme]) -> Iterator[str]:
    schemes = [scheme for scheme in packing.values() if isinstance(scheme, GptqScheme)]
    damping = section.get("damp_percent", 0.01)
    if not isinstance(damping, float | int) or not 0 < damping < 1:
        yield "damp_percent is not between 0 and 1, as transformers wants"
    if any(scheme.version == "gptq" and scheme.format.symmetry == "asymmetric" for scheme in schemes):
        yield "its zeros are asymmetric in version 1, where zeros of 0 are lost; write gptq_v2"
    if consumer == "vllm":
        if any(scheme.format.symmetry == "asymmetric" or scheme.format.bits not in _FAST_BITS for scheme in schemes):
            yield "vLLM reads GPTQ of 4 or 8 bits, symmetric; nearest: compressed-tensors"
        if any(scheme.reordered for scheme in schemes):
            yield "vLLM reads no desc_act with groups; solve with groups: static"


def _notes(
    consumer: Consumer, source: Source, config: LlamaConfig, packing: Mapping[str, PackedScheme]
) -> Iterator[str]:
    compressed = [scheme for scheme in packing.values() if isinstance(scheme, CompressedScheme)]
    if consumer == "transformers" and any(_packs_zeros(scheme) for scheme in compressed):
        yield (
            "asymmetric packed weights: load with quantization_config=CompressedTensorsConfig(dequantize=True); "
            "transformers 5.23 does not build packed zero points"
        )
    if consumer == "transformers" and source.config.get(SECTION, {}).get("quant_method") == "gptq":
        yield "transformers needs optimum and gptqmodel to read GPTQ"
    if consumer == "vllm":
        if source.headers[hf_name("embed_tokens")].dtype == "float32":
            yield "vLLM rounds float32 arrays to 16 bits unless told --dtype float32"
        if any(scheme.format.bits not in _FAST_BITS for scheme in compressed):
            yield "widths other than 4 and 8 bits need a vLLM with Humming kernels (0.33)"
        if not all(_fits_marlin(scheme, shape) for scheme, shape in _shaped(config, packing)):
            yield "some linears do not fit Marlin's tiles (in % 128, out % 64, groups 32, 64, 128): slower kernels run"


def _shaped(config: LlamaConfig, packing: Mapping[str, PackedScheme]) -> Iterator[tuple[PackedScheme, tuple[int, int]]]:
    shapes = linear_shapes(config)
    return ((scheme, shapes[path]) for path, scheme in packing.items())


def _fits_marlin(scheme: PackedScheme, shape: tuple[int, int]) -> bool:
    inputs, outputs = shape
    size = scheme.format.group_size if isinstance(scheme, CompressedScheme | GptqScheme) else None
    return inputs % _MARLIN_INPUTS == 0 and outputs % _MARLIN_OUTPUTS == 0 and size in _MARLIN_GROUPS


def _packs_zeros(scheme: CompressedScheme) -> bool:
    return scheme.layout == "pack-quantized" and scheme.format.symmetry == "asymmetric"
