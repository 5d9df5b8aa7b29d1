"""Cuts structure: layers, sub-blocks, KV groups, FFN neurons, hidden channels, experts, tokens.

The order of reading: `cut_plan` (how many units stay) → `cut` (which stay) → `edits` (what happens
to a parameter) → `design` (the smaller model, and what it lost) → `surgery` (loaded models and
checkpoints). Tokens are cut apart from the rest: `token_texts` (which ones texts need) →
`token_pieces` (how a tokenizer makes them) → `vocabulary`.
"""
