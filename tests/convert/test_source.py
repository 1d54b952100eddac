from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from convert import locate, open_source
from jquant.errors import ConversionError
from jquant.models import LlamaConfig, tiny_hf_config
from tests.convert.folders import random_tensors, write_folder

CONFIG = tiny_hf_config("llama2")


def test_folder_opens_by_path_and_by_text(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(LlamaConfig.from_hf(CONFIG)))
    assert open_source(tmp_path).location == open_source(str(tmp_path)).location == tmp_path


def test_absent_path_is_refused() -> None:
    with pytest.raises(ConversionError, match="does not exist; give a Hugging Face folder"):
        open_source("./no/such/folder")


def test_absent_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(ConversionError, match="does not exist"):
        open_source(Path("owner/name"))


def test_other_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConversionError, match=r"neither a folder nor a \.gguf file"):
        open_source(file)


def test_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/name") == tmp_path
    assert not [pattern for pattern in asked["owner/name"] if "bin" in pattern or "pt" in pattern]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no connection"), HFValidationError("bad"), OSError("lost")])
def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConversionError, match=r"'owner/name' is no path here.*give a folder downloaded elsewhere"):
        open_source("owner/name")


def test_hub_is_not_reached_where_it_is_offline() -> None:
    with pytest.raises(ConversionError, match="check name and connection"):
        open_source("jquant-no-such-owner/no-such-model")
