"""Texts and their answers as what a model of a checkpoint is trained with."""

NO_LABEL = -100


def answer_inputs(model, tokenizer, texts, answers, end_id, start_id=0):
    """Tokenizes texts and the answers that a model is to learn to give, for teacher forcing.

    An encoder-decoder (a model with the input `source_ids`) reads a text as its tokenizer gives it, and learns to say
    the answer and its end. A decoder-only model (with the input `token_ids`) reads the text and the answer in one row,
    and learns the same: the tokens of the text have no label.

    Args:
        model: `keras.Model` that `kt.pretrained.load` returned.
        tokenizer: `tokenizers.Tokenizer`, as `read_tokenizer` returns it.
        texts: strings, what is asked; for a decoder-only model with what parts it from the answer, such as a new line.
        answers: strings, as many.
        end_id: int. The token that ends an answer.
        start_id: int. The token that a decoder behind an encoder begins with.

    Returns:
        A tuple `(inputs, labels)` for `text_batches`: a dict of lists of rows by the names of the model's inputs, and a
        list of rows of labels, -100 where there is nothing to learn. Train with `SmoothedCrossEntropy(pad_id=-100)`.

    Raises:
        ValueError: if texts and answers are not as many, or one of them is empty.

    Example:

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["end", "two", "zwei", "="])}))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> ids = keras.Input((None,), dtype="int32", name="token_ids")
    >>> model = keras.Model(ids, keras.layers.Embedding(4, 4)(ids))
    >>> inputs, labels = answer_inputs(model, tokenizer, ["two ="], ["zwei"], end_id=0)
    >>> inputs, labels
    ({'token_ids': [[1, 3, 2]]}, [[-100, 2, 0]])
    """
    for name, given in (("texts", texts), ("answers", answers)):
        empty = [i for i, text in enumerate(given) if not text.strip()]
        if empty or len(given) != len(texts):
            problem = f"number {empty[0]}, which is empty" if empty else f"{len(given)} for {len(texts)} texts"
            raise ValueError(f"`{name}` must be as many as the others and not empty; received {problem}.")
    sources = [row.ids for row in tokenizer.encode_batch(list(texts))]
    targets = [[*row.ids, end_id] for row in tokenizer.encode_batch(list(answers), add_special_tokens=False)]
    names = [x.name for x in model.inputs]
    if "source_ids" in names:
        inputs = {
            "source_ids": sources,
            "source_padding_mask": [[1] * len(row) for row in sources],
            "target_ids": [[start_id, *row[:-1]] for row in targets],
        }
        return {name: inputs[name] for name in names}, targets
    rows = [source + target[:-1] for source, target in zip(sources, targets, strict=True)]
    inputs = {"token_ids": rows, "padding_mask": [[1] * len(row) for row in rows]}
    labels = [[NO_LABEL] * (len(source) - 1) + target for source, target in zip(sources, targets, strict=True)]
    return {name: inputs[name] for name in names}, labels
