"""``lightning-lora generate``: what an adapter says."""

import sys

from lightning_lora.commands.arguments import Commands, positive_int


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="let an adapter continue a prompt",
        description="Loads an adapter on its base, as the adapter's record names it, and prints what they put behind a "
        "prompt, as it is made. Prompts go through the tokenizer's chat template, if it has one.",
        epilog="example: lightning-lora generate runs/mine/best.ckpt --prompt 'What is a closure?'",
    )
    parser.add_argument("source", metavar="ADAPTER", help="a PEFT folder, a checkpoint, or a hub id")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; else from stdin")
    parser.add_argument("--base", metavar="DIR", help="the base, if it is not where the record says")
    parser.add_argument("--adapter", metavar="NAME", dest="adapter_name", help="which one of a checkpoint with several")
    parser.add_argument("--prompt-template", metavar="TEXT", help="what the run was told: 'Question: {prompt}'")
    parser.add_argument("--max-new-tokens", type=positive_int, default=256, help="at most (default: 256)")
    parser.add_argument("--temperature", type=float, help="draw, at this temperature, instead of the most likely token")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn from (default: 0)")
    parser.set_defaults(run=run)


def run(
    source: str,
    prompt: list[str] | None,
    base: str | None,
    adapter_name: str | None,
    prompt_template: str | None,
    max_new_tokens: int,
    temperature: float | None,
    seed: int,
) -> None:
    """Runs it."""
    import torch
    from transformers.utils import logging

    from lightning_lora.errors import ConfigError, raise_all
    from lightning_lora.recipes.chat import template_problems
    from lightning_lora.recipes.serve import open_adapter, stream

    if temperature is not None and temperature <= 0:
        raise ConfigError(f"--temperature must be positive, got {temperature}: leave it out for the most likely token")
    raise_all(ConfigError, template_problems(prompt_template))
    texts = prompt
    if texts is None:
        texts = ["" if sys.stdin is None or sys.stdin.closed else sys.stdin.read()]
    if not all(text.strip() for text in texts):
        raise ConfigError("the prompt is empty: give --prompt TEXT, or a text on standard input")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    drawn = {} if temperature is None else {"do_sample": True, "temperature": temperature}
    model, tokenizer = open_adapter(source, base, adapter_name)
    for text in texts:
        stream(model, tokenizer, text, prompt_template, max_new_tokens, **drawn)
