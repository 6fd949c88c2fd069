"""Keep a share of what a language model remembers of its prompt, by several methods, and ask it something.

python examples/shrink_kv_cache.py
python examples/shrink_kv_cache.py --model Qwen/Qwen2.5-0.5B-Instruct --tokens 4000 --keep 0.1
"""

import tokencomp
import torch
from shared import ask, chart, language_model, options, own_bytes, run
from tokencomp import methods

METHODS = {
    "SnapKV": methods.SnapKV,
    "AdaKV(SnapKV)": lambda budget: methods.AdaKV(methods.SnapKV(budget)),
    "KeyDiff": methods.KeyDiff,
    "H2O": methods.H2O,
    "first and last": methods.StreamingLLM,
    "random": methods.RandomKV,
}


@torch.no_grad()
def main() -> None:
    given = options(
        __doc__.splitlines()[0], "recall-lm",
        tokens={"type": int, "default": 1024, "help": "of a prompt (default 1024)"},
        keep={"type": float, "default": 0.25, "help": "share of the prompt that stays (default 0.25)"},
        questions={"type": int, "default": 5, "help": "asked (default 5)"},
    )  # fmt: skip
    model, questions = language_model(given.model, given.device, given.tokens, given.questions, given.seed)
    plain = ask(model, questions)
    held = [own_bytes(model, questions[-1].prompt.shape[1]) / 1e6]
    names, right = ["all tokens"], [plain.right / len(questions)]
    print(f"all tokens: {plain.right} of {len(questions)} right, {held[0]:.2f} MB")
    for name, make in METHODS.items():
        with tokencomp.compress(model, make(given.keep)) as handle:
            found = ask(model, questions, handle)
        print(f"{name}: {found.right} of {len(questions)} right. {found.report}")
        names.append(name)
        held.append(found.report.memory.held / 1e6)
        right.append(found.right / len(questions))
    title = f"{given.model}: {given.keep:.0%} of {questions[-1].prompt.shape[1]} tokens kept"
    chart(given.out / "shrink_kv_cache.png", title, names, held, right, "MB held by the cache")


if __name__ == "__main__":
    run(main)
