"""Write on from a prompt in each of the three modes: `python -m examples.generate`.

The random tiny model writes random bytes. Name a model that has learned something to read more:
`--model runs/train_loop`, `--model gpt2`, or a folder that smollm2_from_gguf.py made.
"""

import tyro

from examples import tiny

MODES = {
    "sequence": "one sample of the latent for the whole sequence",
    "token": "a fresh sample of the latent at every step",
    "mixture": "the mean of M samples' probabilities, the same samples at every step",
}


def main(
    *,
    model: str | None = None,
    prompt: str = "The learned transform",
    max_new_tokens: int = 40,
    seed: int = 0,
) -> dict[str, str]:
    """Print and return what each mode writes after the prompt."""
    lm, tokenizer = tiny.perturbed_and_tokenizer(model)
    lm.eval()
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    begin, written = inputs["input_ids"].shape[1], {}
    for mode, what_is_sampled in MODES.items():
        ids = lm.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mode=mode,
            seed=seed,  # of the latents; torch.manual_seed fixes the choice of tokens
            do_sample=True,
            top_p=0.95,
            max_new_tokens=max_new_tokens,
        )
        written[mode] = tokenizer.decode(ids[0, begin:], skip_special_tokens=True)
        print(f"{mode} ({what_is_sampled}):\n    {prompt}{written[mode]!r}")
    return written


if __name__ == "__main__":
    tyro.cli(main)
