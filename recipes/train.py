"""Train a dual encoder with all labels as negatives: the one training script.

    accelerate launch recipes/train.py recipes/static.yaml --data recipes/data/wordnet-hypernyms --output_dir runs/x

Settings stand in YAML files, of which the later override the earlier; flags after them override both. `--help` lists
them all: those of this script, and those of `XMCTrainingArguments`. Leaves `model/` (loads with
`XMCModel.from_pretrained`), `metrics.json` and `history.json`. The model is saved as soon as it is trained, and again
once it has its memory and calibration. The data need no test and no validation split: a part that needs one is skipped,
and the output says so.
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
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

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
from hf_xmc.distributed import from_first
from hf_xmc.hub.card import hardware
from hf_xmc.hub.release import check_target
from hf_xmc.hub.self_contained import check_encoder
from hf_xmc.metrics.calibration import expected_calibration_error, scores_and_hits
from hf_xmc.metrics.frequency import PROPENSITY_PRESETS, by_frequency_decile, inverse_propensity, label_counts
from hf_xmc.model.calibrated import MAX_LABELS
from hf_xmc.search.memory import METRICS

LOSSES = {
    "decoupled_softmax": losses.DecoupledSoftmaxLoss,
    "soft_top_k": losses.SoftTopKLoss,
    "softmax": losses.SoftmaxLoss,
    "bce": losses.BCELoss,
}

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
    output_dir = Path(args.output_dir)
    check_target(output_dir / "model")
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    full = load_xmc(recipe.data)
    for what, count in full.notes.items():
        print(f"{recipe.data}: {what}: {count}")
    data = hold_out(full, recipe.validation_size)
    trainer, train_seconds = fit(recipe, args, data)

    # Only the evaluator of the trainer encodes on all processes; what follows runs on the first one.
    PartialState().destroy_process_group()
    if trainer.is_world_process_zero():
        seen = (data.label_counts() > 0)[data.label_of].tolist()
        model = XMCModel(plain(trainer.model, recipe), data.labels.add_column("seen", seen))
        model.save_pretrained(output_dir / "model")  # before anything that may fail
        report = {"split": None, "deciles": [], "num_train": len(data.train), "train_seconds": train_seconds}
        report |= {"hardware": hardware(), "recipe": vars(recipe), "arguments": args.to_dict()}
        write_json(output_dir / "history.json", trainer.state.log_history)
        write_json(output_dir / "metrics.json", report)

        report |= complete(model, full, data, recipe)
        model.save_pretrained(output_dir / "model")
        write_json(output_dir / "metrics.json", report)
        shown = {name: report[name] for name in ("labels", "memory", "calibration") if name in report}
        print(json.dumps(shown, indent=2, default=str))


def complete(model: XMCModel, full: XMCData, data: XMCData, recipe: RecipeArguments) -> dict:
    """Give a trained model its memory and calibration as far as the data allow, and measure it; returns the metrics.

    Args:
        model: The trained model.
        full: The data as they were loaded.
        data: The same with a validation split taken from train, or ``full`` itself.
        recipe: The settings.
    """
    split = split_to_measure(data)
    measured = data if split == "validation" else full
    metrics = {} if split is None else evaluate(model, measured, split, recipe.propensity)
    settings = add_memory(model, data, recipe) if recipe.memory else None
    if recipe.memory and data is not full:
        model.remember(data.validation)  # before calibrating, which leaves out the own votes of these texts
    thresholds = calibrate(model, data)
    if recipe.memory:
        if split is not None:
            with_memory = evaluate(model, measured, split, recipe.propensity)
            metrics = {**with_memory, "labels": metrics["labels"], "memory": with_memory["labels"]}
        metrics["memory_settings"] = settings
    if model.calibration is not None:
        metrics["calibration"] = measure_calibration(model, measured, split, thresholds)
    return metrics


def parse(argv: list[str]) -> tuple[RecipeArguments, XMCTrainingArguments]:
    """Return the settings of YAML files, if there are any, with the flags after them.

    Raises:
        ValueError: if a setting is wrong, also one that is not used before the end of a run.
    """
    settings: dict[str, object] = {}
    while argv and argv[0].endswith((".yaml", ".yml")):
        settings |= yaml.safe_load(Path(argv[0]).read_text()) or {}
        argv = argv[1:]
    chosen = {name: value for name, value in settings.items() if value is not None}  # null takes a setting back
    argv = [part for name, value in chosen.items() for part in (f"--{name}", str(value))] + argv
    recipe, args = HfArgumentParser((RecipeArguments, XMCTrainingArguments)).parse_args_into_dataclasses(argv)
    for name, known in (("loss", LOSSES), ("propensity", PROPENSITY_PRESETS), ("memory_metric", METRICS)):
        if getattr(recipe, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(recipe, name)!r}.")
    if not 0 <= recipe.validation_size < 1:
        raise ValueError(f"validation_size must be a share from 0 up to below 1, got {recipe.validation_size}.")
    if not 0 <= recipe.memory_tolerance < np.inf:
        raise ValueError(f"memory_tolerance must be a number from 0, got {recipe.memory_tolerance}.")
    return recipe, args


def hold_out(data: XMCData, size: float) -> XMCData:
    """Take a validation split from train, of one query at least; ``data`` itself if it has one or cannot spare any."""
    if data.validation is not None or not size:
        return data
    try:
        carved = data.carve_validation(max(1, round(size * len(data.train))))
    except ValueError as error:
        print(f"no validation split is taken from train: {error}")
        return data
    if not (has_labels(carved, "train") and has_labels(carved, "validation")):
        print("no validation split is taken from train: too few of its queries have labels.")
        return data
    return carved


def queries_to_show(data: XMCData, report: dict) -> tuple[XMCData, str]:
    """Return the data of a finished run, split as its training split them, and the split that its queries are shown of.

    Args:
        data: The data as they were loaded.
        report: What ``metrics.json`` holds. If nothing was measured, training queries are shown.
    """
    return hold_out(data, report["recipe"]["validation_size"]), report["split"] or "train"


def has_labels(data: XMCData, split: str) -> bool:
    """Return whether there is such a split and any of its queries has a label."""
    return getattr(data, split) is not None and data.relevance(split).nnz > 0


def fit(recipe: RecipeArguments, args: XMCTrainingArguments, data: XMCData) -> tuple[XMCTrainer, float]:
    """Train; returns the trainer and the seconds that it took.

    Raises:
        ValueError: if a setting is wrong or the encoder could not be saved, before the first step.
    """
    read = with_phrases(data) if recipe.model == "phrases" else data  # texts as the encoder in training reads them
    if recipe.rarity:
        read = read.weigh_positives(recipe.rarity, *PROPENSITY_PRESETS[recipe.propensity])
    evaluator = None
    if has_labels(read, "validation"):
        evaluator = evaluator_of(read, "validation", recipe.propensity)
        check_metric(args, evaluator)
    else:
        turn_evaluation_off(args)
    encoder = build_encoder(recipe, read, args.seed)
    from_first(lambda: check_encoder(plain(encoder, recipe)))  # transformers saves on the first process only
    trainer = XMCTrainer(
        encoder,
        args,
        read.train,
        labels=read.labels,
        loss=build_loss(recipe),
        evaluator=evaluator,
    )
    if args.label_mode == "mined" and args.num_hard_negatives:
        trainer.add_callback(HardNegativeMiner(trainer, start=recipe.mining_start, every=recipe.mining_every))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer, time.perf_counter() - start


def check_metric(args: XMCTrainingArguments, evaluator: ExtremeMultilabelClassificationEvaluator) -> None:
    """Raise if checkpoints are compared by a metric that the evaluator does not give."""
    metric, names = args.metric_for_best_model, evaluator.metric_names
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model must be one of {', '.join(names)}, got {metric!r}.")


def turn_evaluation_off(args: XMCTrainingArguments) -> None:
    """Train without evaluation and keep the last weights, where there are no validation queries with labels."""
    if args.eval_strategy != IntervalStrategy.NO or args.load_best_model_at_end:
        print("there are no validation queries with labels: nothing is evaluated in training, the last weights stay.")
    args.eval_strategy, args.do_eval, args.eval_on_start = IntervalStrategy.NO, False, False
    args.load_best_model_at_end, args.metric_for_best_model = False, None
    if args.save_strategy == SaveStrategy.BEST:
        args.save_strategy = SaveStrategy.EPOCH


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
    """Remember the training queries, with settings chosen on validation, if that is possible."""
    model.remember(data.train)
    try:
        if not has_labels(data, "validation"):
            raise ValueError("there are no validation queries with labels.")
        a, b = PROPENSITY_PRESETS[recipe.propensity]
        rarity = inverse_propensity(data.label_counts(), len(data.train), a, b) if has_propensity(data) else None
        return model.tune_memory(
            data.validation,
            metric=recipe.memory_metric,
            inverse_propensity=rarity,
            tolerance=0.0 if rarity is None else recipe.memory_tolerance,
            exclude=data.filter_pairs.get("validation"),
        )
    except ValueError as error:
        print(f"the memory is not tuned and keeps its settings: {error}")
        return asdict(model.memory.settings)


def calibrate(model: XMCModel, data: XMCData) -> dict[float, float]:
    """Calibrate on validation, if that is possible; returns the thresholds that reach the wanted precisions there."""
    where = {"exclude": data.filter_pairs.get("validation")}
    try:
        if not has_labels(data, "validation"):
            raise ValueError("there are no validation queries with labels.")
        model.calibrate(data.validation, **where)
    except ValueError as error:
        print(f"the scores are not calibrated, and no thresholds are chosen: {error}")
        return {}
    thresholds = {}
    for wanted in PRECISIONS:
        try:
            thresholds[wanted] = model.threshold_for(data.validation, precision=wanted, **where)
        except ValueError as error:
            print(f"no threshold for a precision of {wanted}: {error}")
    return thresholds


def measure_calibration(model: XMCModel, data: XMCData, split: str, thresholds: dict[float, float]) -> dict:
    """Return ECE@5 before and after, and what the thresholds reach, on the split that the metrics are of.

    Before calibration, a mixed score is the logarithm of a share, and a label score is taken as a logit.
    """
    own = {"leave_one_out": split != "test", "exclude": data.filter_pairs.get(split)}
    found = model.search(list(data.split(split)["text"]), min(MAX_LABELS, data.num_labels), **own)
    relevance = data.relevance(split)
    first, hits = scores_and_hits(TopK(found.label_ids[:, :5], found.scores[:, :5]), relevance)
    before = 1 / (1 + np.exp(-first)) if model.memory is None else np.exp(np.minimum(first, 0))
    probabilities, right = scores_and_hits(TopK(found.label_ids, model.calibration(found.scores)), relevance)
    reached = []
    for wanted, threshold in thresholds.items():
        kept = probabilities >= threshold
        precision = right[kept].mean() if kept.any() else None
        about = {"wanted": wanted, "threshold": threshold, "precision": precision}
        reached.append({**about, "labels_per_text": kept.sum() / relevance.shape[0]})
    return {
        "split": split,
        "labels_of_a_text": MAX_LABELS,
        "ECE@5 before": expected_calibration_error(before, hits),
        "ECE@5": model.calibration.error(found, relevance, 5),
        "thresholds": reached,
    }


def split_to_measure(data: XMCData) -> str | None:
    """Return the test split, or validation if that has no labels; ``None``, and a line of output, if both have none."""
    split = next((name for name in ("test", "validation") if has_labels(data, name)), None)
    if split is None:
        print("there are no test or validation queries with labels: nothing is measured.")
    return split


def has_propensity(data: XMCData) -> bool:
    """Return whether there are enough training queries for the propensities of PSP@k."""
    return len(data.train) >= 3


def evaluator_of(data: XMCData, split: str, propensity: str) -> ExtremeMultilabelClassificationEvaluator:
    """Return the evaluator of a split, without PSP@k if there are too few training queries."""
    if has_propensity(data):
        return ExtremeMultilabelClassificationEvaluator.from_data(data, split, propensity=propensity)
    texts, pairs = list(data.split(split)["text"]), data.filter_pairs.get(split)
    return ExtremeMultilabelClassificationEvaluator(texts, data.relevance(split), data.labels, filter_pairs=pairs)


def evaluate(model: XMCModel, data: XMCData, split: str, propensity: str) -> dict:
    """Return the metrics on a split, in all and by label frequency."""
    evaluator = evaluator_of(data, split, propensity)
    own = {"leave_one_out": split != "test", "exclude": evaluator.filter_pairs}  # validation may be remembered
    found = model.search(evaluator.texts, evaluator.max_k, **own)
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
