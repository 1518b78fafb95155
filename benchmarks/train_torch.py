"""The side of `train.py` that runs on torch: models of its own layers, eager and compiled."""

import time

try:
    import torch
except ImportError as error:
    raise ImportError("This side runs on torch: `pip install keras-transformer-layers[bench]`.") from error
from torch import nn


def training(case, s, side):
    """Functions that take a step and return its seconds."""
    return {f" {name}": step_of(case, s, name == "compiled") for name in ("eager", "compiled")}


def step_of(case, s, compiled):
    model = MODELS[case](s).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01, fused=True)
    forward = torch.compile(model) if compiled else model
    x, y = data_of(case, s)

    def step():
        started = time.perf_counter()
        loss = nn.functional.cross_entropy(forward(*x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - started

    return step


def data_of(case, s):
    if case in ("encoder", "vit"):
        shape = (s["length"], s["dim"]) if case == "encoder" else (3, s["image"], s["image"])
        return [torch.randn(s["batch"], *shape)], torch.randint(0, s["classes"], (s["batch"],))
    *x, y = (torch.randint(1, s["vocabulary"], (s["batch"], s["length"])) for _ in range(3))
    return (x[:1] if case == "causal_lm" else x), y


def layer(kind, s):
    """A block with dropout where the other sides have it: not inside the feed-forward network."""
    layer = kind(s["dim"], s["heads"], s["hidden"], s["dropout"], "gelu", batch_first=True, norm_first=True)
    layer.dropout = nn.Identity()
    return layer


def stack(s):
    return nn.TransformerEncoder(
        layer(nn.TransformerEncoderLayer, s), s["depth"], nn.LayerNorm(s["dim"]), enable_nested_tensor=False
    )


class Encoder(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.blocks, self.logits = stack(s), nn.Linear(s["dim"], s["classes"])

    def forward(self, x):
        return self.logits(self.blocks(x).mean(1))


class Embedding(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(s["vocabulary"], s["dim"]), nn.Embedding(s["length"], s["dim"])
        self.dropout = nn.Dropout(s["dropout"])

    def forward(self, ids):
        return self.dropout(self.tokens(ids) + self.positions.weight)


class CausalLM(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.embedding, self.blocks = Embedding(s), stack(s)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(s["length"]))

    def forward(self, ids):
        x = self.blocks(self.embedding(ids), mask=self.causal, is_causal=True)
        return nn.functional.linear(x, self.embedding.tokens.weight)


class EncoderDecoder(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.source, self.target, self.encoder = Embedding(s), Embedding(s), stack(s)
        block = layer(nn.TransformerDecoderLayer, s)
        self.decoder = nn.TransformerDecoder(block, s["depth"], nn.LayerNorm(s["dim"]))
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(s["length"]))

    def forward(self, source, target):
        context = self.encoder(self.source(source))
        x = self.decoder(self.target(target), context, tgt_mask=self.causal, tgt_is_causal=True)
        return nn.functional.linear(x, self.target.tokens.weight)


class VisionTransformer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.patches = nn.Conv2d(3, s["dim"], s["patch"], s["patch"])
        self.class_token = nn.Parameter(torch.zeros(1, 1, s["dim"]))
        self.positions = nn.Parameter(torch.zeros(1, (s["image"] // s["patch"]) ** 2 + 1, s["dim"]))
        self.dropout, self.blocks, self.logits = nn.Dropout(s["dropout"]), stack(s), nn.Linear(s["dim"], s["classes"])
        for block in self.blocks.layers:
            block.dropout = nn.Dropout(s["dropout"])

    def forward(self, images):
        x = self.patches(images).flatten(2).mT  # [B, T, dim]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.logits(self.blocks(self.dropout(x))[:, 0])


def matmul(size):
    x = torch.randn(size, size)

    def block():
        started = time.perf_counter()
        x @ x
        return time.perf_counter() - started

    return block


MODELS = {"encoder": Encoder, "encoder_decoder": EncoderDecoder, "vit": VisionTransformer, "causal_lm": CausalLM}
