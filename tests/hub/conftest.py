"""The real client of this process, talking to a Hub of our own with an empty cache."""

import huggingface_hub.constants as constants
import pytest
import transformers.utils.hub as transformers_hub
from huggingface_hub import hf_api

from tests.hub.hub_server import WRITE, serve


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """
    The server's state. The client keeps what it read from the environment when it was imported, with the rest of the suite offline: it
    is told anew, as if `HF_ENDPOINT` had been set, and `HF_TOKEN` to one that may write.
    """
    with serve(tmp_path / "server") as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # plain uploads; xet has servers of its own
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made again when it is wanted, with the endpoint above
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield hub
