"""`jquant plan`."""

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from convert.huggingface import StoredDtype
from jquant.commands.display import stdout
from jquant.folders import open_abstract
from jquant.plan import plan
from jquant.recipe import load_recipe
from jquant.tables import plan_linears_table, plan_table


def run(
    source: str,
    /,
    *,
    recipe: str,
    set_: Annotated[Sequence[str], Parameter(name="--set", negative="")] = (),
    dtype: StoredDtype = "auto",
) -> None:
    """Show what a recipe will give and cost on a model; only headers are read.

    Args:
      source: a Hugging Face folder, a GGUF file, a hub id, or a jquant checkpoint.
      recipe: a preset such as gptq-w4g128, or a YAML file.
      set_: a change to the recipe, such as calibration.samples=16; may be given several times.
      dtype: of the model's arrays; auto keeps what is stored.
    """
    chosen = load_recipe(recipe, set_)
    figures = plan(open_abstract(source, dtype=dtype), chosen)
    stdout().print(plan_linears_table(figures))
    stdout().print(plan_table(figures, chosen.name))
