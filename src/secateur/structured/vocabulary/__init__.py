"""Vocabulary trimming: tokens that a text never needs leave tokenizer, embedding and head.

    text ─► counts ─► tokens that stay, with all that makes them ─► tokenizer files, tables

`pieces` knows how the tokenizers of one kind make tokens, `selection` chooses, `files` writes the
tokenizer and the configuration with new ids, and `tables` cuts the rows of the weights.
"""
