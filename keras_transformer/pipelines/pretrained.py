"""Text to text with a checkpoint's own tokenizer."""

from pathlib import Path

from keras_transformer.generation import Generator


class PretrainedPipeline:
    """A generator and the tokenizer of its checkpoint: sentences to sentences, or beginnings to what follows.

    An encoder-decoder reads each text and writes another; a decoder-only model goes on with the text, and what it adds
    is returned. Special tokens are put in as the tokenizer says, and left out of the result.

    Args:
        generator: `keras_transformer.generation.Generator`.
        tokenizer: `tokenizers.Tokenizer`.
        max_new_tokens: int. How many tokens may be generated for one text.

    Raises:
        ValueError: if the model reads no text, or `max_new_tokens` is not a positive integer.

    Example:

    >>> from tokenizers import Tokenizer, models
    >>> words = ["<pad>", "<s>", "</s>", "<unk>", "dogs", "hunde"]
    >>> tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    >>> model = kt.models.transformer(6, 6, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> pipeline = kt.pipelines.PretrainedPipeline(kt.generation.Generator(model, 1, 2), tokenizer, max_new_tokens=4)
    >>> len(pipeline.predict(["dogs", "hunde"]))
    2
    """

    def __init__(self, generator, tokenizer, max_new_tokens=128):
        names = [x.name for x in generator.model.inputs]
        self.input_name = next((name for name in ("source_ids", "token_ids") if name in names), None)
        if self.input_name is None:
            raise ValueError(
                f"`generator` must hold a model that reads `source_ids` or `token_ids`; received one with {names}."
            )
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a positive integer; received {max_new_tokens!r}.")
        self.generator = generator
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens

    def predict(self, texts, batch_size=32):
        """Generates a text for each of a list of texts.

        Args:
            texts: list of str.
            batch_size: int. How many texts to process at once.

        Returns:
            List of str, in the order of `texts`.

        Raises:
            ValueError: if `texts` is one string, or a text has no token.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`texts` must be a list of strings; received {texts!r}.")
        results = []
        for begin in range(0, len(texts), batch_size):
            batch = self.tokenizer.encode_batch(list(texts[begin : begin + batch_size]))
            rows = [encoding.ids for encoding in batch]
            if not all(rows):
                raise ValueError(f"`texts` must have a token each; number {begin + rows.index([])} has none.")
            ids = self.generator.generate({self.input_name: rows}, self.max_new_tokens)
            results.extend(self.tokenizer.decode_batch([self._kept(row) for row in ids.tolist()]))
        return results

    def _kept(self, row):
        """A row of generated ids without what fills it up behind its end."""
        while row and row[-1] == self.generator.pad_id:
            row.pop()
        return row


def load_pretrained(directory, max_new_tokens=128, **options):
    """Loads a checkpoint in the Hugging Face layout with its tokenizer, as a pipeline from text to text.

    Args:
        directory: path of a directory with `config.json`, weights, and `tokenizer.json`.
        max_new_tokens: int. How many tokens may be generated for one text.
        **options: arguments of `Generator`, which go before the settings of the checkpoint.

    Returns:
        `PretrainedPipeline`.

    Raises:
        FileNotFoundError: if there is no `tokenizer.json`.
        ValueError: as `kt.pretrained.load` and `Generator.from_pretrained`.

    Example:

    >>> kt.pipelines.load_pretrained("nowhere")
    Traceback (most recent call last):
    ...
    FileNotFoundError: `directory` must hold the tokenizer of the checkpoint as tokenizer.json; ...
    """
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`directory` must hold the tokenizer of the checkpoint as tokenizer.json; there is no {path}."
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()  # A text that is too long is an error of the model, not cut.
    return PretrainedPipeline(Generator.from_pretrained(directory, **options), tokenizer, max_new_tokens)
