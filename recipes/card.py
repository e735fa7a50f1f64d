"""The model card of a finished run: into its model folder, and wherever else it is wanted.

python recipes/card.py --run runs/demo --data recipes/data/wordnet-hypernyms --output model_cards/static.md
"""

import argparse
import json
from pathlib import Path

import train

from hf_xmc import XMCCard, XMCModel, load_xmc
from hf_xmc.cli import HelpFormatter
from hf_xmc.hub.card import describe_encoder

SHOWN = (
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "seed",
)
FROM_SCRATCH = {
    "static": "a static one (the mean of token vectors)",
    "phrases": "a static one (the mean of the vectors of tokens and of phrases)",
}


def write(run: Path, data_folder: str, **about: str) -> str:
    """Render the card of a run and put it beside the model; returns its text.

    Args:
        run: the output_dir of a finished training.
        data_folder: the data it was trained on.
        about: what else is known, such as ``name``, ``license``, ``language``, ``dataset_id``.
    """
    report = json.loads((run / "metrics.json").read_text())
    recipe, split = report["recipe"], report["split"]
    model = XMCModel.from_pretrained(run / "model")
    data, shown_split = train.queries_to_show(load_xmc(data_folder), report)
    example = data.split(shown_split)["text"][0]
    shown = {name: report["arguments"][name] for name in SHOWN if report["arguments"].get(name) not in (None, -1)}
    from_scratch = recipe["model"] in FROM_SCRATCH
    card = XMCCard(
        num_labels=len(model.labels),
        embedding_dim=model.index.embedding_dim,
        similarity=model.encoder.similarity_fn_name,
        encoder=FROM_SCRATCH.get(recipe["model"]) or describe_encoder(model.encoder, recipe["model"]),
        base_model=None if from_scratch else recipe["model"],
        data=about.pop("data", Path(data_folder).name),
        num_train=report["num_train"],
        num_remembered=model.memory.relevance.shape[0] if model.memory else 0,
        loss=recipe["loss"],
        loss_settings={"temperature": recipe["temperature"]}
        | ({"k": recipe["k"]} if "top_k" in recipe["loss"] else {}),
        hyperparameters={
            "negatives": "all labels",
            "encoder before training": recipe["model"],
            "held out for validation": f"{100 * recipe['validation_size']:g} % of the training queries",
            **shown,
        },
        results={} if split is None else {split: report.get("memory", report["labels"])},
        variants={"without the training memory": report["labels"]} if "memory" in report else {},
        deciles=report["deciles"],
        training_time=f"{report['train_seconds']:.0f} seconds",
        hardware=report["hardware"],
        energy_kwh=report.get("energy_kwh"),
        example=example,
        predictions=model.predict(example, 5),
        **about,
    )
    text = card.render()
    (run / "model" / "README.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the output_dir of a finished training")
    parser.add_argument("--data", required=True, help="the data set it was trained on")
    parser.add_argument("--output", type=Path, help="a second place for the card")
    for name in ("name", "repo_id", "dataset_id", "license", "language"):
        parser.add_argument(f"--{name}", help="for the card")
    options = vars(parser.parse_args())
    run, data, output = (options.pop(name) for name in ("run", "data", "output"))
    text = write(run, data, **{name: value for name, value in options.items() if value})
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    print(run / "model" / "README.md")


if __name__ == "__main__":
    main()
