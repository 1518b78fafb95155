"""The image encoder of SigLIP: a ViT without a class token. Models that see with it leave its pooling away."""

from keras_transformer.layers import MultiHeadSelfAttention
from keras_transformer.pretrained.families import clip_text, towers


def states(fields):
    """From images to `(images, [what goes into the first block, what comes out of it, ...])`."""
    # Whether there is a pooling head; what a larger model says a second time, or of its text.
    fields.ignore("vision_use_head projection_dim num_image_tokens projector_hidden_act vocab_size")
    images, x = towers.patch_sequence(fields, tokens=(), prefix="image_")
    attention = MultiHeadSelfAttention(
        fields.take("num_attention_heads", default=12), dropout=fields.take("attention_dropout", default=0.0)
    )
    blocks = towers.encoder_blocks(fields, x, attention, 3072, "gelu_pytorch_tanh", 1e-6, prefix="image_")
    return images, blocks


def norm(fields):
    return towers.norm(fields, 1e-6, "image_norm")


WEIGHTS = {
    "image_patches/projection": "embeddings.patch_embedding",
    "image_position": "embeddings.position_embedding",
    **clip_text.block_weights("image_"),
    "image_norm": "post_layernorm",
}
