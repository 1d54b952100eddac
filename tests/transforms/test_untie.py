"""Untie: a head of its own, equal to the embedding table."""

import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.models import stack_layers, tiny_config
from jquant.transforms import untie
from tests.transforms.numpy_models import numpy_model


def test_head_is_the_embedding_and_the_config_says_so() -> None:
    model = numpy_model(tiny_config("smollm2"), "float32")
    untied = untie(model)
    assert untied.lm_head is not None
    np.testing.assert_array_equal(untied.lm_head.kernel, model.embed_tokens.T)
    assert (model.config.tie_word_embeddings, untied.config.tie_word_embeddings) == (True, False)
    assert untie(untied) is untied


def test_stacked_model_is_refused() -> None:
    with pytest.raises(FormatError, match="the layers are stacked"):
        untie(stack_layers(numpy_model(tiny_config("smollm2"), "float32")))
