import keras
from keras import ops

from keras_transformer import scopes
from keras_transformer.layers.activations import activate, get_activation
from keras_transformer.layers.cloning import quantization_config, quantized_dtype
from keras_transformer.layers.initialization import RESIDUAL


@keras.saving.register_keras_serializable(package="keras_transformer")
class MixtureOfExperts(keras.layers.Layer):
    """Feed-forward networks of which each token takes a few: those that a learned router scores highest.

    The results of a token's `top_k` experts are added with the softmax of their scores as weights. It stands in place
    of a `FeedForward`, in an `EncoderBlock` or `DecoderBlock` or anywhere else.

    In training all experts compute all tokens, which every backend differentiates quickly. Otherwise a token is
    computed by its own experts alone, in blocks of tokens that share one, with shapes that depend on no token: the
    layer compiles, and the result is the same.

    Args:
        num_experts: int. Number of feed-forward networks.
        hidden_dim: int. Width of the hidden layer of each.
        top_k: int. How many experts a token takes. The weight of a single one is always 1, so that only load balancing
            trains the router then.
        activation: str or callable, as of `FeedForward`; `ClampedSwiGLU` is that of gpt-oss.
        gated: boolean. Whether a second projection gates the hidden layer.
        use_bias: boolean. Whether the experts' projections have biases.
        router_bias: boolean. Whether the router has a bias.
        load_balancing: float. Factor of a loss that is added in training and is least where all experts get the same
            share of the tokens, or 0 for none. Padding is left out of it where there is a mask.
        router_jitter: float less than 1. In training the router's input is multiplied by random numbers between
            `1 - router_jitter` and `1 + router_jitter`.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[..., dim]`.
        mask: boolean tensor of shape `[...]`, True for real tokens. By default the mask that `x` carries.
        training: boolean. Whether jitter and load balancing act.

    Returns:
        Tensor of the shape of `x`.

    Raises:
        ValueError: if a number is out of range, or `activation` needs a gate.

    References: [Switch Transformers](https://arxiv.org/abs/2101.03961), section 2.2, for load balancing and jitter;
    [Mixtral of Experts](https://arxiv.org/abs/2401.04088), section 2.1;
    [MegaBlocks](https://arxiv.org/abs/2211.15841) for blocks in place of a capacity.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> experts = kt.layers.MixtureOfExperts(8, 32, top_k=2)
    >>> tuple(kt.layers.DecoderBlock(4, experts)(np.ones((2, 5, 16), "float32")).shape)
    (2, 5, 16)
    """

    def __init__(
        self,
        num_experts,
        hidden_dim,
        top_k=2,
        activation="silu",
        gated=True,
        use_bias=False,
        router_bias=False,
        load_balancing=0.0,
        router_jitter=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                "`top_k` must be at least 1 and at most `num_experts`; received "
                f"top_k={top_k}, num_experts={num_experts}."
            )
        if hidden_dim < 1:
            raise ValueError(f"`hidden_dim` must be a positive width; received hidden_dim={hidden_dim}.")
        if load_balancing < 0:
            raise ValueError(f"`load_balancing` must be 0 or more; received load_balancing={load_balancing}.")
        if not 0 <= router_jitter < 1:
            raise ValueError(
                f"`router_jitter` must be at least 0 and less than 1; received router_jitter={router_jitter}."
            )
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim
        self.top_k = top_k
        self.activation = get_activation(activation, gated)
        self.gated = gated
        self.use_bias = use_bias
        self.router_bias = router_bias
        self.load_balancing = load_balancing
        self.router_jitter = router_jitter
        if router_jitter > 0:
            self.seed_generator = keras.random.SeedGenerator()
        self.supports_masking = True

    def build(self, input_shape):
        dim = input_shape[-1]
        self.router = keras.layers.Dense(
            self.num_experts,
            use_bias=self.router_bias,
            quantization_config=quantization_config(self.dtype_policy, "router"),
            name="router",
            dtype=self.dtype_policy,
        )
        self.router.build(input_shape)
        self.up, self.up_bias = self._expert_weights("up", dim, self.hidden_dim)
        if self.gated:
            self.gate, self.gate_bias = self._expert_weights("gate", dim, self.hidden_dim)
        self.down, self.down_bias = self._expert_weights("down", self.hidden_dim, dim)

    def _expert_weights(self, name, inputs, outputs):
        # As a `FeedForward` begins, expert by expert: Keras' own initializer would take the first axis for space.
        limit = (6 * RESIDUAL / (inputs + outputs)) ** 0.5
        kernel = self.add_weight(
            name=name,
            shape=(self.num_experts, inputs, outputs),
            initializer=keras.initializers.RandomUniform(-limit, limit),
        )
        bias = None
        if self.use_bias:
            bias = self.add_weight(name=f"{name}_bias", shape=(self.num_experts, outputs), initializer="zeros")
        return kernel, bias

    def call(self, x, mask=None, training=None):
        tokens = ops.reshape(x, (-1, x.shape[-1]))  # [N, dim]
        scores = scopes.record(self, "router_scores", self._route(tokens, training), x)  # [N, experts]
        chosen_scores, chosen = ops.top_k(scores, self.top_k)  # [N, top_k]
        chosen = scopes.record(self, "chosen_experts", ops.cast(chosen, "int32"), scores)
        # Keras warns of a softmax over one entry.
        weights = ops.softmax(chosen_scores, axis=-1) if self.top_k > 1 else ops.ones_like(chosen_scores)
        weights = scopes.record(self, "expert_weights", ops.cast(weights, tokens.dtype), scores, chosen)
        if training and self.load_balancing:
            self.add_loss(self.load_balancing * self._imbalance(scores, chosen, mask))
        compute = self._by_all if training else self._by_chosen
        output = ops.reshape(compute(tokens, weights, chosen), ops.shape(x))
        return scopes.record(self, "output", output, x, weights, chosen)

    def _route(self, tokens, training):
        if training and self.router_jitter:
            low, high = 1 - self.router_jitter, 1 + self.router_jitter
            noise = keras.random.uniform(ops.shape(tokens), low, high, dtype="float32", seed=self.seed_generator)
            tokens = tokens * ops.cast(noise, tokens.dtype)
        return ops.cast(self.router(tokens), keras.backend.result_type(tokens.dtype, "float32"))

    def _imbalance(self, scores, chosen, mask):
        """Equation 4 of Switch Transformers: 1 for each of a token's experts if all get the same share."""
        real = ops.ones_like(scores[:, :1]) if mask is None else ops.reshape(ops.cast(mask, scores.dtype), (-1, 1))
        total = ops.maximum(ops.sum(real), 1)
        assigned = ops.sum(ops.one_hot(chosen, self.num_experts, dtype=scores.dtype), axis=1)  # [N, experts]
        share = ops.sum(assigned * real, axis=0) / total
        probability = ops.sum(ops.softmax(scores, axis=-1) * real, axis=0) / total
        return self.num_experts * ops.sum(share * probability)

    def _by_all(self, tokens, weights, chosen):
        """Every expert computes every token: `[N, dim]`."""
        chosen = ops.one_hot(chosen, self.num_experts, dtype=weights.dtype)  # [N, top_k, experts]
        weights = ops.sum(ops.expand_dims(weights, -1) * chosen, axis=1)  # [N, experts]
        results = self._feed_forward(tokens, self._kernels_and_biases())  # [experts, N, dim]
        return ops.einsum("ne,end->nd", weights, results)

    def _by_chosen(self, tokens, weights, chosen):
        """Each token is computed by its own experts: `[N, dim]`."""
        count = ops.shape(tokens)[0] * self.top_k
        chosen = ops.reshape(chosen, (-1,))
        if isinstance(count, int) and count <= self.num_experts:
            results = self._one_by_one(tokens, chosen)
        else:
            results = self._in_blocks(tokens, chosen, count)
        results = ops.reshape(results, (-1, self.top_k, tokens.shape[-1]))  # [N, top_k, dim]
        return ops.sum(results * ops.expand_dims(weights, -1), axis=1)

    def _one_by_one(self, tokens, chosen):
        """The result of each token and expert, `[N * top_k, dim]`, from a copy of the expert for each."""
        rows = ops.expand_dims(ops.repeat(tokens, self.top_k, axis=0), 1)  # [N * top_k, 1, dim]
        return ops.squeeze(self._feed_forward(rows, pick(self._kernels_and_biases(), chosen)), axis=1)

    def _in_blocks(self, tokens, chosen, count):
        """The result of each token and expert, `[N * top_k, dim]`, from blocks of tokens that share an expert."""
        size = block_size(count, self.num_experts)
        block_expert, sources, places = make_blocks(chosen, count, self.num_experts, size)
        blocks = ops.take(tokens, sources // self.top_k, axis=0)  # [blocks, size, dim]
        experts = self._kernels_and_biases()

        def compute(block):
            expert, rows = block
            return ops.cond(
                expert >= 0,
                lambda: self._feed_forward(rows, pick(experts, expert)),
                lambda: ops.zeros_like(rows),
            )

        results = ops.map(compute, (block_expert, blocks))  # [blocks, size, dim]
        return ops.take(ops.reshape(results, (-1, tokens.shape[-1])), places, axis=0)

    def _kernels_and_biases(self):
        gate = (self.gate, self.gate_bias) if self.gated else (None, None)
        parts = (self.up, self.up_bias, *gate, self.down, self.down_bias)
        return [None if part is None else ops.convert_to_tensor(part) for part in parts]

    def _feed_forward(self, x, experts):
        """Rows `[..., N, dim]` through experts whose kernels are `[..., dim, hidden]` and biases `[..., hidden]`."""
        up, up_bias, gate, gate_bias, down, down_bias = experts
        hidden = activate(self.activation, affine(x, up, up_bias), None if gate is None else affine(x, gate, gate_bias))
        return affine(hidden, down, down_bias)

    def compute_output_spec(self, x, mask=None, training=None):
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            **quantized_dtype(self),
            "num_experts": self.num_experts,
            "hidden_dim": self.hidden_dim,
            "top_k": self.top_k,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "router_bias": self.router_bias,
            "load_balancing": self.load_balancing,
            "router_jitter": self.router_jitter,
        }


def pick(experts, chosen):
    """Of kernels and biases `[experts, ...]`, any of which may be None, those of the `chosen` experts."""
    return [None if part is None else ops.take(part, chosen, axis=0) for part in experts]


def affine(x, kernel, bias):
    y = ops.matmul(x, kernel)
    return y if bias is None else y + ops.expand_dims(bias, -2)


def block_size(count, num_experts):
    """Rows of a block: about those of an expert, so that padding does not outweigh the `count` rows.

    Below 16 the reading of the kernels is what takes the time, and beyond 128 nothing is gained.
    """
    return min(max(count // num_experts, 16), 128) if isinstance(count, int) else 32


def make_blocks(chosen, count, num_experts, size):
    """Sorts rows by the expert that each has chosen into blocks of `size` rows with one expert.

    How many blocks there are depends on the number of rows alone: as many as any choice of experts can need. Where an
    expert's rows end before its last block does, the block is filled with any others.

    Args:
        chosen: int32 tensor of shape `[count]`, the expert of each row.
        count: int or int32 scalar tensor.
        num_experts: int.
        size: int.

    Returns:
        Tuple of int32 tensors: the expert of each block, `[blocks]`, which is -1 where no row needs it; the row that
        stands at each place of each block, `[blocks, size]`; and the place of each row in the blocks one after
        another, `[count]`.
    """
    order = ops.cast(ops.argsort(chosen), "int32")  # Row numbers, expert by expert.
    rank = ops.cast(ops.argsort(order), "int32")  # Where each row stands in that order.
    rows = ops.sum(ops.one_hot(chosen, num_experts, dtype="int32"), axis=0)  # [experts]
    blocks = (rows + size - 1) // size
    first_row, first_block = ops.cumsum(rows) - rows, ops.cumsum(blocks) - blocks
    numbers = ops.arange((count + num_experts * (size - 1)) // size, dtype="int32")
    # The last expert whose blocks begin at or before this one.
    begun = ops.cast(ops.expand_dims(numbers, 1) >= first_block, "int32")  # [blocks, experts]
    block_expert = ops.sum(begun, axis=1) - 1
    first = ops.take(first_row, block_expert) + (numbers - ops.take(first_block, block_expert)) * size
    places = ops.expand_dims(first, 1) + ops.arange(size, dtype="int32")  # [blocks, size]
    sources = ops.take(order, ops.minimum(places, count - 1))
    shift = ops.take(first_block * size - first_row, chosen)
    return ops.where(numbers < ops.sum(blocks), block_expert, -1), sources, rank + shift
