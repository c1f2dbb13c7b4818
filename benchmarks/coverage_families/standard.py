"""Families of torch's own modules, used as its documentation shows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coverage_families.family import CLASSES, VOCABULARY, Family, make_images, make_labels, make_tokens


def classify(*shape: int) -> "ClassifyNoise":
    """Make a loss that classifies a batch of noise of this shape."""
    return ClassifyNoise(shape)


class ClassifyNoise:
    """Cross-entropy of a model's output for noise and drawn labels."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(torch.randn(self.shape)), make_labels(self.shape[0]))


def classify_tokens(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(make_tokens()), make_labels())


def predict_tokens(model: nn.Module) -> Tensor:
    tokens = make_tokens(length=13)
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def make_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


class TokenEncoder(nn.Module):
    """A transformer encoder that classifies token sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 48)
        self.position = nn.Parameter(torch.randn(1, 12, 48) * 0.02)
        layer = nn.TransformerEncoderLayer(48, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens) + self.position).mean(1))


class TokenDecoder(nn.Module):
    """A causal language model of pre-norm encoder layers with tied input and output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 48)
        nn.init.normal_(self.embed.weight, std=0.2)
        layer = nn.TransformerEncoderLayer(
            48, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(self.embed(tokens), mask=mask, is_causal=True))


def make_transformer() -> nn.Module:
    return nn.Transformer(48, 4, 2, 2, 128, dropout=0.0, batch_first=True)


def transform_noise(model: nn.Module) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    source, target = torch.randn(4, 10, 48), torch.randn(4, 8, 48)
    return F.mse_loss(model(source, target, tgt_mask=mask), torch.randn(4, 8, 48))


def make_decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(48, 4, 128, dropout=0.0, batch_first=True), 2)


def decode_noise(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randn(4, 8, 48), torch.randn(4, 10, 48)), torch.randn(4, 8, 48))


def make_dcgan_generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def generate_images(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randn(8, 16, 1, 1)), torch.rand(8, 3, 16, 16))


def make_dcgan_discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(16, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(32, 1, 4, 1, 0, bias=False),
        nn.Flatten(),
    )


def tell_real_from_false(model: nn.Module) -> Tensor:
    real, false = model(make_images(6)), model(make_images(6))
    ones, zeros = torch.ones_like(real), torch.zeros_like(false)
    return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(false, zeros)


class RecurrentClassifier(nn.Module):
    """Embedding, a recurrent network of this class, and a linear head."""

    def __init__(self, recurrent: Callable[..., nn.Module], **settings: bool | int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.recurrent = recurrent(16, 48, batch_first=True, **settings)
        self.head = nn.Linear(96 if settings.get("bidirectional") else 48, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embed(tokens))
        return self.head(states.mean(1))


class CellClassifier(nn.Module):
    """An LSTM cell in a loop of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 48)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.head(state[0])


class VAE(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance


def bound_evidence(model: nn.Module) -> Tensor:
    x = torch.rand(8, 64)
    logits, mean, log_variance = model(x)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()
    return F.binary_cross_entropy_with_logits(logits, x) + divergence


def make_convolution_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Two levels down, two up, with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = make_convolution_block(3, 16), make_convolution_block(16, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge, self.out = make_convolution_block(32, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        return self.out(self.merge(torch.cat([fine, self.up(coarse)], 1)))


def denoise_images(model: nn.Module) -> Tensor:
    clean = make_images(4)
    return F.mse_loss(model(clean + 0.1 * torch.randn_like(clean)), clean)


class ResidualBlock(nn.Module):
    """The basic block of a ResNet, with in-place activations."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = make_convolution_block(inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def make_resnet() -> nn.Module:
    return nn.Sequential(
        make_convolution_block(3, 16),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class SqueezeExcite(nn.Module):
    """Scale the channels by what two linear layers make of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * scale[:, :, None, None]


def make_squeeze_excite() -> nn.Module:
    return nn.Sequential(
        make_convolution_block(3, 32),
        SqueezeExcite(32),
        make_convolution_block(32, 32, 2),
        SqueezeExcite(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def make_depthwise_separable() -> nn.Module:
    layers: list[nn.Module] = [make_convolution_block(3, 24)]
    for inputs, outputs in ((24, 48), (48, 64)):
        depthwise = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False)
        layers += [depthwise, nn.BatchNorm2d(inputs), nn.ReLU6(), nn.Conv2d(inputs, outputs, 1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def make_conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(16, 16, 3, padding=1, bias=False),
        nn.InstanceNorm3d(16, affine=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class WaveNet(nn.Module):
    """Gated, dilated, causal convolutions with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.gated = nn.ModuleList(nn.Conv1d(24, 48, 2, dilation=2**level) for level in range(3))
        self.residual = nn.ModuleList([*(nn.Conv1d(24, 24, 1) for _ in range(2)), nn.Identity()])
        self.skip = nn.ModuleList(nn.Conv1d(24, 48, 1) for _ in range(3))
        self.out = nn.Conv1d(48, VOCABULARY, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x, total = self.embed(tokens).transpose(1, 2), torch.zeros(())
        for level, (gated, residual, skip) in enumerate(
            zip(self.gated, self.residual, self.skip, strict=True)
        ):
            signal, gate = gated(F.pad(x, (2**level, 0))).chunk(2, 1)
            hidden = signal.tanh() * gate.sigmoid()
            total, x = total + skip(hidden), x + residual(hidden)
        return self.out(F.relu(total)).transpose(1, 2)


class NeRF(nn.Module):
    """Fourier features, an MLP with a skip connection, density and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.density, self.colour = nn.Linear(64, 1), nn.Linear(64, 3)

    def forward(self, points: Tensor) -> Tensor:
        angles = (points.unsqueeze(-1) * 2.0 ** torch.arange(6)).flatten(-2)
        features = torch.cat([angles.sin(), angles.cos()], -1)
        hidden = self.second(torch.cat([self.first(features), features], -1))
        weights = self.density(hidden).softmax(1)
        return (weights * self.colour(hidden).sigmoid()).sum(1)


def render_rays(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.rand(16, 8, 3)), torch.rand(16, 3))


class Recommender(nn.Module):
    """Bags of items and users as embeddings, then an MLP over both and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(40, 16, mode="mean")
        self.users = nn.Embedding(10, 16)
        self.head = nn.Sequential(
            nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, items: Tensor, users: Tensor) -> Tensor:
        item, user = self.items(items), self.users(users)
        return self.head(torch.cat([item, user, item * user], 1)).squeeze(1)


def recommend(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randint(40, (8, 4)), torch.randint(10, (8,))), torch.randn(8))


class Siamese(nn.Module):
    """One encoder applied to both of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return F.cosine_similarity(self.encoder(left), self.encoder(right))


def compare_pairs(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randn(8, 32), torch.randn(8, 32)), torch.rand(8))


STANDARD = (
    Family("mlp", make_mlp, classify(8, 32)),
    Family("nn.TransformerEncoder", TokenEncoder, classify_tokens),
    Family("nn.TransformerEncoder causal", TokenDecoder, predict_tokens),
    Family("nn.TransformerDecoder", make_decoder, decode_noise),
    Family("nn.Transformer", make_transformer, transform_noise),
    Family("dcgan generator", make_dcgan_generator, generate_images),
    Family("dcgan discriminator", make_dcgan_discriminator, tell_real_from_false),
    Family("lstm", lambda: RecurrentClassifier(nn.LSTM, bidirectional=True), classify_tokens),
    Family("gru", lambda: RecurrentClassifier(nn.GRU, num_layers=2), classify_tokens),
    Family("lstm cell", CellClassifier, classify(4, 6, 16)),
    Family("vae", VAE, bound_evidence),
    Family("u-net", UNet, denoise_images),
    Family("resnet", make_resnet, classify(4, 3, 16, 16)),
    Family("squeeze-excite", make_squeeze_excite, classify(4, 3, 16, 16)),
    Family("depthwise separable", make_depthwise_separable, classify(4, 3, 16, 16)),
    Family("3-d convolution", make_conv3d, classify(4, 1, 8, 8, 8)),
    Family("wavenet", WaveNet, predict_tokens),
    Family("nerf", NeRF, render_rays),
    Family("recommender", Recommender, recommend),
    Family("siamese", Siamese, compare_pairs),
)
