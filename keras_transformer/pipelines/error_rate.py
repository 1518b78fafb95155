"""How far what was written down is from what was said."""


def error_rate(texts, answers, letters=False):
    """The word error rate of answers, or their character error rate.

    That is the number of words that must be replaced, put in or taken out to make the answers right, over the number of
    words in all texts. It may be more than 1.

    Args:
        texts: list of str, what is right.
        answers: list of str, as many.
        letters: boolean. Whether to count characters in place of words, spaces included.

    Returns:
        float.

    Raises:
        ValueError: if the lists differ in length, or there is nothing to be said.

    Example:

    >>> error_rate(["four score", "and seven years"], ["for score", "and seven"])  # one replaced, one missing, of 5
    0.4
    >>> error_rate(["seven"], ["eleven"], letters=True)
    0.4
    """
    import keras_nlp
    import tensorflow as tf

    if len(texts) != len(answers) or not any(text.strip() for text in texts):
        raise ValueError(
            "`texts` and `answers` must be as many, with a word among them; received "
            f"{len(texts)} texts and {len(answers)} answers."
        )

    def parts(strings):
        strings = tf.constant(strings, "string")
        return tf.strings.unicode_split(strings, "UTF-8") if letters else tf.strings.split(strings)

    distance = keras_nlp.metrics.EditDistance()
    distance.update_state(parts(texts), parts(answers))
    return round(float(distance.result()), 6)
