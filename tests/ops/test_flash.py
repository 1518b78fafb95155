"""Causality and padding that are told without a mask, against the plain kernel with one."""

import keras
import numpy as np
import pytest
from harness import as_numpy, case_id, compiled, gradients, pairs, random
from keras import ops

import keras_transformer as kt
from keras_transformer.ops import dot_product_attention

LENGTH, WIDTH = 6, 8
PADDINGS = {
    "none": None,
    "all real": np.ones((3, LENGTH), bool),
    "at the end": np.arange(LENGTH) < np.array([[6], [2], [0]]),
    "at the start": np.arange(LENGTH) >= np.array([[0], [4], [6]]),
    "inside": np.array([[True, False, True, True, False, True]] * 3),
    "one row for all": np.arange(LENGTH)[None] < 4,
}
DTYPES = {"float32": 2e-6, "bfloat16": 3e-2}
if keras.backend.backend() != "jax":  # Whose kernel that stands in for cuDNN's multiplies no float16 on a CPU.
    DTYPES["float16"] = 4e-3
CASES = pairs(padding=tuple(PADDINGS), causal=(False, True), key_heads=(4, 2), dtype=tuple(DTYPES), jit=(False, True))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """JAX takes the way it takes on a GPU, with the kernel of its own that has cuDNN's arguments and runs here."""
    monkeypatch.setattr(kt.ops.flash, "_on_jax_gpu", lambda: keras.backend.backend() == "jax")
    monkeypatch.setattr(kt.ops.flash, "JAX_KERNEL", "xla")


def drawn(key_heads, dtype):
    return [
        ops.cast(random(3, heads, LENGTH, WIDTH, seed=i), dtype) for i, heads in enumerate((4, key_heads, key_heads))
    ]


def mask_of(padding, causal):
    mask = np.ones((3, LENGTH, LENGTH), bool)
    if padding is not None:
        mask &= padding[:, None]
    return mask & (np.tri(LENGTH) > 0) if causal else mask


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_what_is_told_equals_the_mask_that_says_it(as_on_a_gpu, case):
    padding, tolerance = PADDINGS[case["padding"]], DTYPES[case["dtype"]]
    mask = mask_of(padding, case["causal"])
    values = drawn(case["key_heads"], case["dtype"])
    expected = as_numpy(dot_product_attention(*values, mask, kernel="plain"))

    def told(*tensors):
        return dot_product_attention(
            *tensors,
            kernel="fused",
            causal=case["causal"],
            padding=None if padding is None else ops.convert_to_tensor(padding),
        )

    output = as_numpy((compiled(told) if case["jit"] else told)(*values))
    np.testing.assert_allclose(output, expected, atol=tolerance)
    assert not output[~np.broadcast_to(mask.any(-1)[:, None], output.shape[:3])].any()
    np.testing.assert_allclose(
        as_numpy(dot_product_attention(*values, kernel="plain", causal=case["causal"], padding=padding)),
        expected,
        atol=tolerance,
    )


@pytest.mark.parametrize(
    "case", pairs(padding=tuple(PADDINGS), causal=(False, True), dtype=("float32", "bfloat16")), ids=case_id
)
def test_gradients_are_those_with_a_mask(as_on_a_gpu, case):
    padding = PADDINGS[case["padding"]]
    mask = mask_of(padding, case["causal"])
    variables = [keras.Variable(x, dtype=case["dtype"]) for x in drawn(2, case["dtype"])]
    probe = ops.cast(random(3, 4, LENGTH, WIDTH, seed=9), case["dtype"])

    def found(**options):
        return gradients(
            lambda: ops.sum(dot_product_attention(*(v + 0 for v in variables), **options) * probe), variables
        )

    told = found(
        kernel="fused", causal=case["causal"], padding=None if padding is None else ops.convert_to_tensor(padding)
    )
    for one, other in zip(told, found(kernel="plain", mask=mask), strict=True):
        np.testing.assert_allclose(one, other, atol=20 * DTYPES[case["dtype"]])


@pytest.mark.parametrize("lengths", [(5, 5), (5, 6), (6, 5)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_lengths_may_be_odd(as_on_a_gpu, monkeypatch, lengths, padded):
    seen = []
    if keras.backend.backend() == "jax":
        import jax

        real = jax.nn.dot_product_attention

        def kernel(query, key, value, **options):
            seen.append((query.shape[1], key.shape[1]))
            return real(query, key, value, **options)

        monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    query, key = (random(2, 4, length, WIDTH, seed=length) for length in lengths)
    values = [ops.cast(x, "bfloat16") for x in (query, key, key)]
    padding = np.arange(lengths[1]) < np.array([[lengths[1]], [3]]) if padded else None
    causal = lengths[0] == lengths[1]
    told = dot_product_attention(*values, kernel="fused", causal=causal, padding=padding)
    plain = dot_product_attention(*values, kernel="plain", causal=causal, padding=padding)
    np.testing.assert_allclose(as_numpy(told), as_numpy(plain), atol=3e-2)
    assert all(size % 2 == 0 for pair in seen for size in pair)
    assert bool(seen) == (keras.backend.backend() == "jax")


def test_an_odd_length_with_a_mask_takes_plain_products_on_a_gpu_of_jax(as_on_a_gpu, monkeypatch):
    taken = []
    monkeypatch.setattr(kt.ops.attention, "_fused_is_faster", lambda: True)
    monkeypatch.setattr(kt.ops.attention, "_fused", lambda query, *_: taken.append(query.shape[2]))
    for length in (5, 6):
        query, key, value = (x[:, :, :length] for x in drawn(4, "bfloat16"))
        dot_product_attention(query, key, value, mask=np.ones((length, length), bool))
    assert taken == ([6] if keras.backend.backend() == "jax" else [5, 6])


def test_an_explicit_mask_goes_with_what_is_told():
    explicit = np.random.default_rng(0).random((3, LENGTH, LENGTH)) < 0.6
    padding = PADDINGS["at the end"]
    values = drawn(2, "float32")
    expected = as_numpy(dot_product_attention(*values, explicit & mask_of(padding, True), kernel="plain"))
    for kernel in ("plain", "fused", "auto"):
        output = dot_product_attention(*values, explicit, kernel=kernel, causal=True, padding=padding)
        np.testing.assert_allclose(as_numpy(output), expected, atol=2e-6)


def test_a_single_query_takes_plain_products_on_a_gpu_of_jax(as_on_a_gpu, monkeypatch):
    taken = []
    monkeypatch.setattr(kt.ops.attention, "flash_attention", lambda *_: taken.append("flash"))
    for length, expected in ((1, []), (2, ["flash"])):
        taken.clear()
        query, key, value = drawn(4, "bfloat16")
        dot_product_attention(query[:, :, :length], key, value)
        if keras.backend.backend() == "jax":
            assert taken == expected


def test_layers_tell_kernels_of_causality_and_padding(as_on_a_gpu, monkeypatch):
    told = []
    monkeypatch.setattr(kt.ops.attention, "_fused_is_faster", lambda: True)
    real = kt.ops.attention.flash_attention

    def flash(query, key, value, causal, padding, scale, otherwise):
        told.append((causal, padding is not None))
        return real(query, key, value, causal, padding, scale, otherwise)

    monkeypatch.setattr(kt.ops.attention, "flash_attention", flash)
    x, mask = random(3, LENGTH, WIDTH), ops.convert_to_tensor(PADDINGS["at the end"])
    kt.layers.MultiHeadSelfAttention(2, causal=True)(x)
    kt.layers.MultiHeadSelfAttention(2, causal=True)(x, mask=mask)
    kt.layers.MultiHeadSelfAttention(2)(x, mask=mask)
    kt.layers.CrossAttention(2)(x, x, context_mask=mask)
    kt.layers.CrossAttention(2)(x, x)
    assert told == [(True, False), (True, True), (False, True), (False, True), (False, False)]
    kt.layers.MultiHeadSelfAttention(2, causal=True, sliding_window=3)(x)
    kt.layers.MultiHeadSelfAttention(2)(x, attention_mask=np.ones((3, LENGTH, LENGTH), bool))
    assert len(told) == 5


if keras.backend.backend() == "jax":
    import jax

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_the_gpu_is_asked_only_where_it_must_be(as_on_a_gpu, causal, padded):
        """A branch costs more than attention does: XLA waits for the GPU to know which to take."""
        padding = ops.convert_to_tensor(PADDINGS["inside"]) if padded else None

        def loss(*values):
            return ops.sum(dot_product_attention(*values, kernel="fused", causal=causal, padding=padding))

        program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*drawn(2, "bfloat16")))
        assert "cond[" not in program
        assert program.count("while[") == (2 if causal and padded else 0)
