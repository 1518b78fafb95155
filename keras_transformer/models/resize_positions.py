import keras
import numpy as np

from keras_transformer.layers import PatchEmbedding, PositionalEmbedding


def resize_positions(model, image_shape):
    """A model of images, as trained on one size, for images of another size.

    Its learned positions are interpolated over the grid of patches, bicubically; those of class tokens stay as they
    are. All other weights are copied.

    Args:
        model: functional `keras.Model` with an input `images`, learned positions and `PatchEmbedding` or a model of
            `vision_transformer`.
        image_shape: tuple `(height, width)`, or with channels.

    Returns:
        `keras.Model`, not compiled.

    Raises:
        ValueError: if the model has no such parts, or its patches do not fill images of that size.

    References: [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929), section 3.2, for interpolating;
    [Keys, 1981](https://doi.org/10.1109/TASSP.1981.1163711), for the cubic kernel, with a slope of -0.75.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> small = kt.models.vision_transformer((32, 32, 3), 10, patch_size=8, dim=16, depth=1)
    >>> large = kt.models.resize_positions(small, (64, 48))
    >>> tuple(large(np.zeros((2, 64, 48, 3), "float32")).shape)
    (2, 10)
    """
    images = next((x for x in model.inputs if x.name == "images"), None)
    positions = [x for x in model.layers if isinstance(x, PositionalEmbedding) and x.kind == "learned"]
    patches = next((x for x in model.layers if isinstance(x, PatchEmbedding) or x.name == "patches"), None)
    if images is None or patches is None or len(positions) != 1:
        raise ValueError(
            "`model` must have an input `images`, patches and one layer of learned positions; received the inputs "
            f"{[x.name for x in model.inputs]} and {len(positions)} layers of learned positions."
        )
    if isinstance(patches, PatchEmbedding) and patches.input.shape[1:3] != images.shape[1:3]:
        raise ValueError(
            f"`model` must make patches of whole images; this one takes them from {patches.input.shape[1:3]} of the "
            f"{images.shape[1:3]} pixels, which would stay so."
        )
    (position,) = positions
    shape = (*image_shape[:2], images.shape[-1])
    old_grid = _grid(patches)
    extra = position.max_length - old_grid[0] * old_grid[1]
    # How many patches there will be is known when the layers before them are there: there are no more than pixels.
    resized = _rebuilt(model, {images.name: shape}, {position.name: extra + shape[0] * shape[1]})
    new_grid = _grid(resized.get_layer(patches.name))
    resized = _rebuilt(model, {images.name: shape}, {position.name: extra + new_grid[0] * new_grid[1]})
    table = keras.ops.convert_to_numpy(position.position_table)
    front = position.offset + extra  # Rows that no patch reads.
    grid = _interpolated(table[front:].reshape(*old_grid, -1), new_grid).reshape(-1, table.shape[-1])
    for old, new in zip(model.weights, resized.weights, strict=True):
        new.assign(np.concatenate([table[:front], grid]) if old is position.position_table else old)
    return resized


def _grid(patches):
    """Rows and columns of patches."""
    rows, columns = patches.input.shape[1:3]
    height, width = getattr(patches, "patch_size", (1, 1))  # Convolutions have made patches of pixels before.
    return rows // height, columns // width


def _rebuilt(model, shapes, lengths):
    """A model of the same layers, with other shapes of inputs and lengths of positions."""
    config = model.get_config()
    for layer in config["layers"]:
        layer.pop("build_config", None)  # It holds the shapes of before.
        if layer["name"] in shapes:
            layer["config"]["batch_shape"] = (None, *shapes[layer["name"]])
        if layer["name"] in lengths:
            layer["config"]["max_length"] = lengths[layer["name"]]
    return type(model).from_config(config)


def _interpolated(grid, size):
    """A grid `[height, width, dim]` at another size."""
    rows, columns = (_cubic(old, new) for old, new in zip(grid.shape, size, strict=False))
    return np.einsum("ih,hwd,jw->ijd", rows, grid.astype("float64"), columns)


def _cubic(old, new, slope=-0.75):
    """The share `[new, old]` of each old place in each new one; those at the edge go on beyond it."""
    if old == new:
        return np.eye(old)
    places = (np.arange(new) + 0.5) * old / new - 0.5
    below = np.floor(places).astype(int)
    shares = np.zeros((new, old))
    for i in range(-1, 3):
        away = np.abs(places - below - i)
        near = (slope + 2) * away**3 - (slope + 3) * away**2 + 1
        far = slope * (away**3 - 5 * away**2 + 8 * away - 4)
        np.add.at(shares, (np.arange(new), np.clip(below + i, 0, old - 1)), np.where(away <= 1, near, far))
    return shares
