"""Point this process's Hub client at the stand-in server of `hub_server`, without a new interpreter."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.support.hub_server import Hub


class HubClient:
    """
    The real client with a different endpoint, cache and token. The client reads environment variables at import, so its
    constants are replaced instead.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hub: Hub, home: str):
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{home}/token")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        # The functions of huggingface_hub are methods of this object, which is created at import.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        self.use_cache(f"{home}/hub")
        self.log_in("hf_writer")

    def use_cache(self, folder: str) -> None:
        """Use a folder as the Hub cache."""
        self.monkeypatch.setattr(constants, "HF_HUB_CACHE", folder)

    def log_in(self, token: str | None) -> None:
        """Log in with a token, or log out with `None`."""
        if token is None:
            self.monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            self.monkeypatch.setenv("HF_TOKEN", token)

    def go_offline(self) -> None:
        """Set the client to offline mode."""
        self.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
