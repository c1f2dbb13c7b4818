"""How families build a model of the package transformers, small and without dropout."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from coverage_families.family import VOCABULARY, Family, make_labels, make_tokens


def build_small(model_class: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return a function that builds this class of transformers with these settings."""

    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        kind = getattr(transformers, model_class)
        return kind(switch_dropout_off(kind.config_class(**settings)))

    return build


def switch_dropout_off(config: Any) -> Any:
    """Set every probability of dropping something to zero, in nested configurations too."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif hasattr(value, "to_dict"):
            switch_dropout_off(value)
    return config


def predict_next(model: nn.Module) -> Tensor:
    """Language modelling: the labels are the tokens, which a causal model shifts itself."""
    tokens = make_tokens()
    return model(input_ids=tokens, labels=tokens).loss


def fill_in(model: nn.Module) -> Tensor:
    """Masked language modelling: the labels are not the tokens."""
    return model(input_ids=make_tokens(), labels=make_tokens()).loss


def classify_text(model: nn.Module) -> Tensor:
    """Sequence classification."""
    return model(input_ids=make_tokens(), labels=make_labels()).loss


def translate(model: nn.Module) -> Tensor:
    """Sequence to sequence; the model shifts the labels itself."""
    return model(input_ids=make_tokens(8), labels=make_tokens(8, 8)).loss


def make_family(
    name: str, model_class: str, loss: Callable[[nn.Module], Tensor], settings: dict[str, Any]
) -> Family:
    """Return the family of this class of transformers."""
    return Family(name, build_small(model_class, **settings), loss, "transformers")


TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Settings that every text model has."""

DECODER = TOKENS | {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 32, "use_cache": False},
}
"""Settings of a decoder with the names that most have."""

ENCODER = TOKENS | {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 32, "type_vocab_size": 2, "num_labels": 5},
}
"""Settings of an encoder with the names that most have."""
