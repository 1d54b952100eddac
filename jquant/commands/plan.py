"""`jquant plan`."""

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from convert.huggingface import StoredDtype
from jquant.commands.display import stdout
from jquant.folders import open_abstract
from jquant.formats import tree_nbytes
from jquant.models import SHAPES, abstract_llama
from jquant.plan import plan
from jquant.recipe import load_recipe
from jquant.simulate import simulate
from jquant.tables import plan_linears_table, plan_table, simulation_table


def run(
    source: str,
    /,
    *,
    recipe: str,
    set_: Annotated[Sequence[str], Parameter(name="--set", negative="")] = (),
    dtype: StoredDtype = "auto",
    devices: Sequence[int] = (),
) -> None:
    """Show what a recipe will give and cost on a model; only headers are read.

    Args:
      source: a Hugging Face folder, a GGUF file, a hub id, a jquant checkpoint, or the name of a known shape such as
        llama-3.1-70b, then of bfloat16.
      recipe: a preset such as gptq-w4g128, or a YAML file.
      set_: a change to the recipe, such as calibration.samples=16; may be given several times.
      dtype: of the model's arrays; auto keeps what is stored.
      devices: numbers of H100s to simulate the run on, by measured rates; may be given several times.
    """
    chosen = load_recipe(recipe, set_)
    if source in SHAPES:
        model = abstract_llama(SHAPES[source], "bfloat16" if dtype == "auto" else dtype)
    else:
        model = open_abstract(source, dtype=dtype)
    figures = plan(model, chosen)
    stdout().print(plan_linears_table(figures))
    stdout().print(plan_table(figures, chosen.name))
    if devices:
        table, heads = tree_nbytes(model.embed_tokens), model.config.num_key_value_heads
        rows = [simulate(figures, devices=count, table_nbytes=table, kv_heads=heads) for count in devices]
        stdout().print(simulation_table(rows))
