"""``lightning-lora combine``: several adapters as one, without their base."""

from pathlib import Path

from lightning_lora.commands.arguments import Commands, local_path, positive_int, weighted


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "combine",
        help="make one adapter of several",
        description="Makes one PEFT folder of several adapters, without their base. 'cat' is their exact weighted sum, "
        "with the sum of their ranks; 'svd' its best approximation with --rank. DoRA adapters need the base.",
        epilog="example: lightning-lora combine adapters/both adapters/korean:0.7 adapters/coding:0.3 --method svd "
        "--rank 16",
    )
    parser.add_argument("out", metavar="OUT", type=local_path, help="the folder to write; other files in it stay")
    parser.add_argument(
        "sources", metavar="FOLDER:WEIGHT", type=weighted, nargs="+", help="PEFT folders or checkpoints (weight: 1)"
    )
    parser.add_argument(
        "--method", default="cat", help="cat, svd, linear, ties, dare_linear or dare_ties (default: cat)"
    )
    parser.add_argument("--rank", type=positive_int, help="rank of the result, for svd, ties and dare")
    parser.add_argument("--density", type=float, help="the share that ties and dare keep (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="what dare draws from (default: 0)")
    parser.add_argument("--adapter-name", default="combined", help="name of the new adapter (default: combined)")
    parser.add_argument(
        "--allow-base-mismatch", action="store_true", help="combine adapters of different bases, that fit"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an adapter that is in OUT")
    parser.set_defaults(run=run)


def run(
    out: Path,
    sources: list[tuple[Path, float]],
    method: str,
    rank: int | None,
    density: float | None,
    seed: int,
    adapter_name: str,
    allow_base_mismatch: bool,
    overwrite: bool,
) -> None:
    """Runs it."""
    from lightning_lora.files.combine import combine_files

    report = combine_files(
        out,
        sources,
        method,
        rank,
        density=density,
        seed=seed,
        adapter_name=adapter_name,
        allow_base_mismatch=allow_base_mismatch,
        overwrite=overwrite,
    )
    print(report)
    print(f"the adapter is in {out}")
