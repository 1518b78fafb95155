"""The peers' side of `gpu.py`: the same shapes in torch libraries, compiled, in bfloat16, with a fused AdamW."""

import importlib
import math
import time

from gpu import STEPS

try:
    import torch
except ImportError as error:
    raise ImportError(
        "The peers run on torch, which is missing: `pip install keras-transformer-layers[bench-gpu]`."
    ) from error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_float32_matmul_precision("high")


def required(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"This peer needs {name}: `pip install keras-transformer-layers[bench-gpu]`.") from error


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def blocks_of(step):
    def block():
        step()
        synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        synchronize()
        return (time.perf_counter() - started) / STEPS

    return {"": block}


def matmul(s, peer):
    x = torch.randn(s["size"], s["size"], device=DEVICE, dtype=torch.bfloat16)
    return blocks_of(lambda: x @ x)


def training(model, loss_of):
    """Steps of training with float32 weights, products in bfloat16."""
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01, fused=True)
    compiled = torch.compile(lambda: loss_of(model))

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = compiled()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return blocks_of(step)


def gpt2_model(s):
    transformers = required("transformers")
    configuration = transformers.GPT2Config(
        vocab_size=s["vocabulary"], n_positions=s["length"], n_embd=s["dim"], n_layer=s["depth"], n_head=s["heads"],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(configuration)


def gpt2(s, peer):
    tokens = torch.randint(1, s["vocabulary"], (s["batch"], s["length"] + 1), device=DEVICE)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss_of(model):
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return training(gpt2_model(s), loss_of)


def vit(s, peer):
    model = required("timm").models.VisionTransformer(
        img_size=s["image"], patch_size=s["patch"], embed_dim=s["dim"], depth=s["depth"], num_heads=s["heads"],
        num_classes=s["classes"],
    )  # fmt: skip
    images = torch.randn(s["batch"], 3, s["image"], s["image"], device=DEVICE)
    labels = torch.randint(0, s["classes"], (s["batch"],), device=DEVICE)
    return training(model, lambda model: torch.nn.functional.cross_entropy(model(images).float(), labels))


class Translator(torch.nn.Module):
    """`torch.nn.Transformer` with embeddings, sinusoidal positions and a tied output projection."""

    def __init__(self, s):
        super().__init__()
        self.source, self.target = (torch.nn.Embedding(s["vocabulary"], s["dim"]) for _ in range(2))
        self.transformer = torch.nn.Transformer(
            s["dim"], s["heads"], s["depth"], s["depth"], s["hidden"], dropout=0.0, batch_first=True
        )
        frequencies = torch.exp(torch.arange(0, s["dim"], 2) * (-math.log(10000.0) / s["dim"]))
        angles = torch.arange(s["length"])[:, None] * frequencies
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        self.register_buffer("causal", self.transformer.generate_square_subsequent_mask(s["length"]))
        self.scale = math.sqrt(s["dim"])

    def forward(self, source, target):
        source = self.source(source) * self.scale + self.positions
        target = self.target(target) * self.scale + self.positions
        hidden = self.transformer(source, target, tgt_mask=self.causal, tgt_is_causal=True)
        return torch.nn.functional.linear(hidden, self.target.weight)


def translation(s, peer):
    source, target, labels = (
        torch.randint(1, s["vocabulary"], (s["batch"], s["length"]), device=DEVICE) for _ in range(3)
    )

    def loss_of(model):
        logits = model(source, target)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return training(Translator(s), loss_of)


def generate(s, peer):
    """`model.generate`, greedy; with `-static` the cache has a fixed size, and steps are compiled."""
    model = gpt2_model(s).to(DEVICE, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": s["tokens"], "min_new_tokens": s["tokens"], "do_sample": False, "pad_token_id": 0}
    if peer == "transformers-static":
        options["cache_implementation"] = "static"

    def way(batch):
        prompt = torch.randint(1, s["vocabulary"], (batch, s["prompt"]), device=DEVICE)
        mask = torch.ones_like(prompt)

        def block():
            synchronize()
            started = time.perf_counter()
            with torch.no_grad():
                result = model.generate(prompt, attention_mask=mask, **options)
            synchronize()
            seconds = time.perf_counter() - started
            if result.shape != (batch, s["prompt"] + s["tokens"]):
                raise RuntimeError(f"`generate` gave {tuple(result.shape)}, not {s['tokens']} tokens a row")
            return seconds

        return block

    return {f" batch {batch}": way(batch) for batch in s["batches"]}


WAYS = {"matmul": matmul, "gpt2": gpt2, "vit": vit, "translation": translation, "generate": generate}
