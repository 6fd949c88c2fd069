"""Read less of a long prompt: sparse attention in the prompt and in decode steps, with every token kept.

python examples/long_prompts.py
python examples/long_prompts.py --model Qwen/Qwen2.5-0.5B-Instruct --tokens 16000
"""

import tokencomp
import torch
from shared import ask, chart, language_model, options, run
from tokencomp import methods

METHODS = {
    "decode: Quest, 128 slots in pages of 4": methods.Quest(k=128, chunk=4, dense=0),
    "decode: TokenSelect, 128 slots": methods.TokenSelect(k=92, sinks=4, recent=32),
    "decode: Twilight, 85 % of the attention": methods.Twilight(p=0.85, dense=0),
    "prompt: MInference": methods.MInference(vertical=128, slash=64, sinks=4, recent=16),
    "prompt: XAttention": methods.XAttention(threshold=0.9),
}


@torch.no_grad()
def main() -> None:
    given = options(
        __doc__.splitlines()[0], "recall-lm",
        tokens={"type": int, "default": 2048, "help": "of a prompt (default 2048)"},
        questions={"type": int, "default": 4, "help": "asked (default 4)"},
    )  # fmt: skip
    model, questions = language_model(given.model, given.device, given.tokens, given.questions, given.seed)
    plain = ask(model, questions)
    print(f"all: {plain.right} of {len(questions)} right in {plain.seconds:.2f} s")
    names, shares, right = ["all"], [100.0], [plain.right / len(questions)]
    for name, method in METHODS.items():
        with tokencomp.compress(model, method) as handle:
            found = ask(model, questions, handle)
        layers = [layer.sparse for layer in found.report.layers if layer.sparse is not None]
        of = [one.prompt_density if name.startswith("prompt") else one.density for one in layers]
        share = 100 * sum(of) / len(of)
        print(f"{name}: {found.right} of {len(questions)} right, {share:.1f} % read, {found.seconds:.2f} s")
        names.append(name)
        shares.append(share)
        right.append(found.right / len(questions))
    title = f"{given.model}, {questions[-1].prompt.shape[1]} tokens"
    chart(given.out / "long_prompts.png", title, names, shares, right, "% of the keys read, in that part")


if __name__ == "__main__":
    run(main)
