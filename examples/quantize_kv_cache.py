"""Hold a KV cache in fewer bits, without forgetting a token, and compare bytes and answers.

python examples/quantize_kv_cache.py
python examples/quantize_kv_cache.py --model Qwen/Qwen2.5-0.5B-Instruct --tokens 4000
"""

import tokencomp
import torch
from shared import ask, chart, language_model, options, own_bytes, run
from tokencomp import methods

# The prompt is short, and so is the window of exact tokens; edges=0, since the model has but four layers.
SHORT = {"recent": 32, "edges": 0}
METHODS = {
    "8 bits": methods.Uniform(8, **SHORT),
    "4 bits": methods.Uniform(4, **SHORT),
    "KIVI, 2 bits": methods.KIVI(2, **SHORT),
    "2 bits": methods.Uniform(2, **SHORT),
    "a fifth evicted, 4 and 2 bits": methods.Tiered(methods.KeyDiff(1.0), **SHORT),
}


@torch.no_grad()
def main() -> None:
    given = options(
        __doc__.splitlines()[0], "recall-lm",
        tokens={"type": int, "default": 1024, "help": "of a prompt (default 1024)"},
        questions={"type": int, "default": 3, "help": "asked (default 3)"},
    )  # fmt: skip
    model, questions = language_model(given.model, given.device, given.tokens, given.questions, given.seed)
    model = model.bfloat16()
    plain = ask(model, questions)
    held = [own_bytes(model, questions[-1].prompt.shape[1]) / 1e6]
    names, right = ["16 bits"], [plain.right / len(questions)]
    print(f"16 bits: {plain.right} of {len(questions)} right, {held[0]:.2f} MB")
    for name, method in METHODS.items():
        with tokencomp.compress(model, method) as handle:
            found = ask(model, questions, handle)
        print(f"{name}: {found.right} of {len(questions)} right. {found.report}")
        names.append(f"{name}: {found.report.bits:.1f}")
        held.append(found.report.memory.held / 1e6)
        right.append(found.right / len(questions))
    title = f"{given.model}, {questions[-1].prompt.shape[1]} tokens: bits an element"
    chart(given.out / "quantize_kv_cache.png", title, names, held, right, "MB held by the cache")


if __name__ == "__main__":
    run(main)
