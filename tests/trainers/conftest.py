"""No network: huggingface_hub reads these when it is imported."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

pytest.register_assert_rewrite(f"{__package__}.promises")
