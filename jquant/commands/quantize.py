"""`jquant quantize`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from convert.huggingface import StoredDtype
from jquant.blocks import ActivationPlace
from jquant.budget import ModelPlace
from jquant.commands.devices import ONE_DEVICE, Devices, is_first
from jquant.commands.display import show_progress, stdout
from jquant.folders import make_writable, write_text
from jquant.pages import quantization_page
from jquant.pipeline import quantize
from jquant.recipe import load_recipe, to_yaml
from jquant.tables import finding_tables, report_table


def run(
    source: str,
    out: Path,
    /,
    *,
    recipe: str,
    set_: Annotated[Sequence[str], Parameter(name="--set", negative="")] = (),
    data: Path | None = None,
    dtype: StoredDtype = "auto",
    resume: Annotated[bool, Parameter(negative="")] = False,
    memory: ModelPlace | Literal["auto"] = "auto",
    activations: ActivationPlace | Literal["auto"] = "auto",
    report: Path | None = None,
    devices: Devices = ONE_DEVICE,
) -> None:
    """Quantize a model by a recipe; the result has recipe, report and tokenizer with it.

    A run that was stopped goes on from its last finished block when the same command is given again.

    Args:
      source: a Hugging Face folder, a GGUF file, a hub id, or an unquantized jquant checkpoint.
      out: the folder to make.
      recipe: a preset such as gptq-w4g128, or a YAML file.
      set_: a change to the recipe, such as calibration.samples=16, or *.scale_dtype=bfloat16 for every format;
        may be given several times.
      data: the folder where the files of the calibration data set lie, instead of the hub.
      dtype: of the model's arrays, and so of the calibration; auto keeps what is stored.
      resume: refuse to begin a new run: there must be one to go on with.
      memory: whole loads the model, blocks reads one block at a time from disk; auto reads blocks where the whole is
        predicted to take more than 80 % of what is free. The result is the same.
      activations: where calibration activations are kept: on the device, in host memory, or on disk; auto likewise.
      report: an HTML file to write: the result by layer, the recipe, where the data came from.
      devices: which devices; calibration windows are spread over all of them. The result has the same bits on 1 to 8.
    """
    mesh = devices.start()
    chosen = load_recipe(recipe, set_)
    if report is not None:
        make_writable(report.parent)
    with show_progress() as on_progress:
        found = quantize(
            source,
            out,
            chosen,
            folder=data,
            dtype=dtype,
            resume=resume,
            memory=memory,
            activations=activations,
            devices=() if mesh is None else tuple(mesh.devices.ravel()),
            on_progress=on_progress,
        )
    if not is_first():
        return
    for table in (report_table(found), *finding_tables(found)):
        stdout().print(table)
    if report is not None:
        write_text(report, quantization_page(found, to_yaml(chosen)))
    stdout().print(f"saved in {out}; {out / 'report.json'} has every linear", markup=False, highlight=False)
