"""Train a dual encoder with all labels as negatives: the one training script.

    accelerate launch recipes/train.py recipes/static.yaml --data recipes/data/wordnet-hypernyms --output_dir runs/x

Settings stand in YAML files, of which the later override the earlier; flags after them override both. `--help` lists
them all: those of this script, and those of `XMCTrainingArguments`. Leaves `model/` (loads with
`XMCModel.from_pretrained`), `metrics.json` and `history.json`.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import yaml
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import HfArgumentParser, set_seed

from hf_xmc import (
    ExtremeMultilabelClassificationEvaluator,
    HardNegativeMiner,
    TopK,
    XMCData,
    XMCModel,
    XMCTrainer,
    XMCTrainingArguments,
    load_xmc,
    losses,
    phrase_encoder,
    standalone,
    static_encoder,
    with_phrases,
)
from hf_xmc.calibration import expected_calibration_error, scores_and_hits
from hf_xmc.card import hardware
from hf_xmc.frequency import PROPENSITY_PRESETS, by_frequency_decile, inverse_propensity, label_counts

LOSSES = {
    "decoupled_softmax": losses.DecoupledSoftmaxLoss,
    "soft_top_k": losses.SoftTopKLoss,
    "softmax": losses.SoftmaxLoss,
    "bce": losses.BCELoss,
}

CALIBRATED = 10  # labels of a text that probabilities and thresholds are fitted on
PRECISIONS = (0.7, 0.8, 0.9)  # wanted of thresholds


@dataclass
class RecipeArguments:
    data: str = field(metadata={"help": "A folder in any layout that load_xmc reads, or a data set of the Hub."})
    model: str = field(
        default="static",
        metadata={
            "help": "A sentence-transformers model, by folder or Hub name, or one made from the data: `static`, or "
            "`phrases`, which knows pairs of words too."
        },
    )
    embedding_dim: int = field(default=512, metadata={"help": "Of a model made from the data."})
    vocab_size: int = field(default=50_000, metadata={"help": "Of a model made from the data."})
    num_phrases: int = field(default=100_000, metadata={"help": "Pairs of words in `phrases`."})
    initial_std: float = field(default=0.5, metadata={"help": "Of the vectors of a model made from the data."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens of a text that are read."})
    pooling: str | None = field(
        default=None,
        metadata={"help": "How the tokens of a plain transformer become one vector: `cls`, `mean`, ..."},
    )
    normalize: bool = field(default=False, metadata={"help": "Give embeddings length 1: scores are cosines."})
    loss: str = field(default="decoupled_softmax", metadata={"help": f"One of {', '.join(LOSSES)}."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the scores; about 0.05 for cosines."})
    k: float = field(default=5, metadata={"help": "The budget of soft_top_k."})
    alpha: float = field(default=1.0, metadata={"help": "The sharpness of soft_top_k."})
    rarity: float = field(
        default=0.0,
        metadata={"help": "Weighs positives by this power of their inverse propensity: above 0 for rare labels."},
    )
    mining_start: int = field(
        default=0, metadata={"help": "Epochs before hard negatives are mined, in label_mode `mined`."}
    )
    mining_every: int = field(default=1, metadata={"help": "Epochs from one mining to the next."})
    validation_size: float = field(
        default=0.02, metadata={"help": "Share of train to validate on where the data has no such split; 0 for none."}
    )
    propensity: str = field(default="default", metadata={"help": "Preset of A and B for PSP@k."})
    memory: bool = field(default=True, metadata={"help": "Let the nearest training queries vote on the labels."})
    memory_metric: str = field(default="nDCG@5", metadata={"help": "What tuning the memory makes large on validation."})
    memory_tolerance: float = field(
        default=0.005, metadata={"help": "How much of that tuning may give up to raise PSP@5."}
    )


def main(argv: list[str]) -> None:
    recipe, args = parse(argv)
    set_seed(args.seed)
    full = load_xmc(recipe.data)
    for what, count in full.notes.items():
        print(f"{recipe.data}: {what}: {count}")
    carve = recipe.validation_size > 0 and full.validation is None
    data = full.carve_validation(recipe.validation_size) if carve else full
    trainer, train_seconds = fit(recipe, args, data)

    # Encoding is shared among the processes by hand of the trainer only; the rest is for one.
    PartialState().destroy_process_group()
    if trainer.is_world_process_zero():
        output_dir = Path(args.output_dir)
        seen = (data.label_counts() > 0)[data.label_of].tolist()
        model = XMCModel(plain(trainer.model, recipe), data.labels.add_column("seen", seen))
        metrics = evaluate(model, full, recipe.propensity)
        tuned = add_memory(model, data, recipe) if recipe.memory else None
        thresholds = calibrate(model, data) if data.validation is not None else {}
        if recipe.memory:
            if carve:
                model.remember(data.validation)
            with_memory = evaluate(model, full, recipe.propensity)
            metrics = {**with_memory, "labels": metrics["labels"], "memory": with_memory["labels"]}
            metrics["memory_settings"] = tuned
        if model.calibration is not None:
            metrics["calibration"] = measure_calibration(model, full, thresholds)
        model.save_pretrained(output_dir / "model")
        # Settings of the recipe and of the loop, and what they gave.
        report = {**metrics, "num_train": len(data.train), "train_seconds": train_seconds, "hardware": hardware()}
        report |= {"recipe": vars(recipe), "arguments": args.to_dict()}
        write_json(output_dir / "metrics.json", report)
        write_json(output_dir / "history.json", trainer.state.log_history)
        print(
            json.dumps(
                {name: metrics[name] for name in ("labels", "memory", "calibration") if name in metrics}, indent=2
            )
        )


def parse(argv: list[str]) -> tuple[RecipeArguments, XMCTrainingArguments]:
    """The settings of YAML files, if there are any, with the flags after them."""
    settings: dict[str, object] = {}
    while argv and argv[0].endswith((".yaml", ".yml")):
        settings |= yaml.safe_load(Path(argv[0]).read_text())
        argv = argv[1:]
    chosen = {name: value for name, value in settings.items() if value is not None}  # null takes a setting back
    argv = [part for name, value in chosen.items() for part in (f"--{name}", str(value))] + argv
    recipe, args = HfArgumentParser((RecipeArguments, XMCTrainingArguments)).parse_args_into_dataclasses(argv)
    if recipe.loss not in LOSSES:
        raise ValueError(f"loss is one of {', '.join(LOSSES)}, got {recipe.loss!r}.")
    return recipe, args


def fit(recipe: RecipeArguments, args: XMCTrainingArguments, data: XMCData) -> tuple[XMCTrainer, float]:
    """Train; returns the trainer and the seconds that it took."""
    read = with_phrases(data) if recipe.model == "phrases" else data  # texts as the encoder in training reads them
    if recipe.rarity:
        read = read.weigh_positives(recipe.rarity, *PROPENSITY_PRESETS[recipe.propensity])
    trainer = XMCTrainer(
        build_encoder(recipe, read, args.seed),
        args,
        read.train,
        labels=read.labels,
        loss=build_loss(recipe),
        evaluator=None
        if read.validation is None
        else ExtremeMultilabelClassificationEvaluator.from_data(read, "validation", propensity=recipe.propensity),
    )
    if args.label_mode == "mined" and args.num_hard_negatives:
        trainer.add_callback(HardNegativeMiner(trainer, start=recipe.mining_start, every=recipe.mining_every))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer, time.perf_counter() - start


def plain(encoder: SentenceTransformer, recipe: RecipeArguments) -> SentenceTransformer:
    """The encoder in training as one of plain texts."""
    return standalone(encoder) if recipe.model == "phrases" else encoder


def build_encoder(recipe: RecipeArguments, data: XMCData, seed: int) -> SentenceTransformer:
    settings = {
        "embedding_dim": recipe.embedding_dim,
        "vocab_size": recipe.vocab_size,
        "std": recipe.initial_std,
        "seed": seed,
    }
    if recipe.model in ("static", "phrases"):
        texts = [*data.train["text"], *data.labels["text"]]
        if recipe.model == "static":
            return static_encoder(texts, **settings)
        return phrase_encoder(texts, num_phrases=recipe.num_phrases, **settings)
    if recipe.pooling is None:
        encoder = SentenceTransformer(recipe.model)
    else:
        transformer = Transformer(recipe.model)
        encoder = SentenceTransformer(
            modules=[transformer, Pooling(transformer.get_embedding_dimension(), recipe.pooling)]
        )
    if recipe.max_seq_length is not None:
        encoder.max_seq_length = recipe.max_seq_length
    if recipe.normalize and not isinstance(encoder[-1], Normalize):
        encoder.append(Normalize())
    return encoder


def build_loss(recipe: RecipeArguments) -> losses.DecoupledSoftmaxLoss:
    extra = {"k": recipe.k, "alpha": recipe.alpha} if recipe.loss == "soft_top_k" else {}
    return LOSSES[recipe.loss](temperature=recipe.temperature, **extra)


def add_memory(model: XMCModel, data: XMCData, recipe: RecipeArguments) -> dict:
    """Remember the training queries, with settings chosen on validation, if there is one."""
    model.remember(data.train)
    if data.validation is None:
        return asdict(model.memory.settings)
    a, b = PROPENSITY_PRESETS[recipe.propensity]
    return model.tune_memory(
        data.validation,
        metric=recipe.memory_metric,
        inverse_propensity=inverse_propensity(data.label_counts(), len(data.train), a, b),
        tolerance=recipe.memory_tolerance,
        exclude=data.filter_pairs.get("validation"),
    )


def calibrate(model: XMCModel, data: XMCData) -> dict[float, float]:
    """Calibrate on validation; returns the thresholds that reach the wanted precisions there, if any does."""
    where = {"top_k": CALIBRATED, "exclude": data.filter_pairs.get("validation")}
    model.calibrate(data.validation, **where)
    thresholds = {}
    for wanted in PRECISIONS:
        try:
            thresholds[wanted] = model.threshold_for(data.validation, precision=wanted, **where)
        except ValueError as error:
            print(f"no threshold for a precision of {wanted}: {error}")
    return thresholds


def measure_calibration(model: XMCModel, data: XMCData, thresholds: dict[float, float]) -> dict:
    """ECE@5 before and after, and what the thresholds reach, on the split that the metrics are of.

    Before calibration, a mixed score is the logarithm of a share, and a label score is taken as a logit.
    """
    split = split_to_measure(data)
    found = model.search(list(data.split(split)["text"]), CALIBRATED, exclude=data.filter_pairs.get(split))
    relevance = data.relevance(split)
    first, hits = scores_and_hits(TopK(found.label_ids[:, :5], found.scores[:, :5]), relevance)
    before = 1 / (1 + np.exp(-first)) if model.memory is None else np.exp(np.minimum(first, 0))
    scores, right = scores_and_hits(found, relevance)
    reached = []
    for wanted, threshold in thresholds.items():
        kept = model.calibration(scores) >= threshold
        precision = right[kept].mean() if kept.any() else None
        about = {"wanted": wanted, "threshold": threshold, "precision": precision}
        reached.append({**about, "labels_per_text": kept.sum() / len(relevance.indptr[1:])})
    return {
        "split": split,
        "labels_of_a_text": CALIBRATED,
        "ECE@5 before": expected_calibration_error(before, hits),
        "ECE@5": expected_calibration_error(model.calibration(first), hits),
        "thresholds": reached,
    }


def split_to_measure(data: XMCData) -> str:
    split = next((name for name in ("test", "validation") if getattr(data, name) is not None), None)
    if split is None:
        raise ValueError("the data set has neither a test nor a validation split to measure the model on.")
    return split


def evaluate(model: XMCModel, data: XMCData, propensity: str) -> dict:
    """Metrics on the test split, or on validation where there is none, in all and by label frequency."""
    split = split_to_measure(data)
    evaluator = ExtremeMultilabelClassificationEvaluator.from_data(data, split, propensity=propensity)
    found = model.search(evaluator.texts, evaluator.max_k, exclude=evaluator.filter_pairs)
    metrics = evaluator.score(found)
    size = {name: metrics.pop(name) for name in ("num_queries", "num_empty")}
    deciles = []
    if np.count_nonzero(label_counts(evaluator.relevance)) >= 10:
        deciles = by_frequency_decile(found.label_ids, evaluator.relevance, data.label_counts())
    return {"split": split, **size, "labels": metrics, "deciles": [decile._asdict() for decile in deciles]}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, default=str))


if __name__ == "__main__":
    main(sys.argv[1:])
