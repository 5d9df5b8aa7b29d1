"""Run by a test with plain transformers: loads models, and compares logits and generated tokens.

Usage: python load_plain.py FOLDER...; each holds a model and `expected.pt`: windows and logits.
"""

import sys
from pathlib import Path

import torch
import transformers

CODE = "modeling_secateur_varied.py"
folders = [Path(folder) for folder in sys.argv[1:]]

for folder in folders:
    if (folder / CODE).exists():
        message = ""
        try:
            transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            message = str(error)
        assert "trust_remote_code" in message, f"{folder}: {message}"

for folder in folders:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    windows = expected["windows"]
    varied = (folder / CODE).exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=varied)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=varied)
    assert tokenizer("a pruned tree")["input_ids"]
    with torch.no_grad():
        found = model.eval()(input_ids=windows, use_cache=False).logits
    torch.testing.assert_close(found, expected["logits"], rtol=0, atol=1e-5)  # see same_logits.py
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    texts = [
        model.generate(
            windows[:, :9], attention_mask=torch.ones(1, 9), use_cache=use, **options
        ).tolist()
        for use in (True, False)
    ]
    assert texts[0] == texts[1], folder
    assert "secateur" not in sys.modules
    print(folder.name, type(model).__name__)
