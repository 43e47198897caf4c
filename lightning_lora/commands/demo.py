"""``lightning-lora demo``: a small fine-tuning run, here and now."""

from lightning_lora.commands.arguments import Commands, positive_int


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="adapt a small language model, here and now, without a download",
        description="Adapts a small language model (about 1 M parameters, in the package) from CPython's sources to "
        "the prose of its manual, with the real Trainer, callback and checkpoints. Under 90 s on two cores.",
        epilog="example: lightning-lora demo --use-dora --r 4 --steps 100 --output runs/dora",
    )
    parser.add_argument("--r", type=int, default=8, help="rank of the adapters (default: 8)")
    parser.add_argument("--steps", type=positive_int, default=250, help="optimizer steps (default: 250)")
    parser.add_argument("--use-dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--output", default="runs/demo", help="folder for checkpoint and metrics (default: runs/demo)")
    parser.set_defaults(run=run)


def run(**options: object) -> None:
    """Runs it."""
    from lightning_lora.demo.run import demo

    demo(**options)  # type: ignore[arg-type]
