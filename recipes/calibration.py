"""Compare ways of calibration: fit each on validation queries with a trained model, and measure it on test.

    python recipes/calibration.py --model runs/x/model --data recipes/data/wordnet-hypernyms --validation_size 0.05

Pass a model from `train.py`, and the validation size of its training. ECE@5 is the expected calibration error of the
first five labels. Rows: the number of labels per text used for fitting, with and without the memory; plain isotonic
regression instead of centered; separate maps for labels that are predicted often.
"""

import argparse

import numpy as np
import scipy.sparse as sp
from sklearn.isotonic import IsotonicRegression

from hf_xmc import TopK, XMCModel, load_xmc
from hf_xmc.cli import HelpFormatter
from hf_xmc.experiment.splits import has_labels, hold_out
from hf_xmc.metrics.calibration import Calibration, expected_calibration_error, scores_and_hits

READ = 5  # labels per text for measuring the error
DEPTHS = (5, 10, 20, 100)
FLOORS = (30, 60, 100, 200)


def first(found: TopK, k: int) -> TopK:
    return TopK(found.label_ids[:, :k], found.scores[:, :k])


def plain_isotonic(validation: TopK, relevance: sp.csr_array, test: TopK) -> np.ndarray:
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(*scores_and_hits(validation, relevance))
    return fitted.predict(test.scores.ravel()).reshape(test.scores.shape)


def maps_of_frequent_labels(validation: TopK, relevance: sp.csr_array, test: TopK, floor: int) -> np.ndarray:
    """Fit a separate map for each label with enough validation predictions, and one for all other labels."""
    label_ids, counts = np.unique(validation.label_ids, return_counts=True)
    probabilities = Calibration.fit(validation, relevance)(test.scores)
    for label in label_ids[counts >= floor]:
        mine = test.label_ids == label
        known = TopK(np.where(validation.label_ids == label, label, -1), validation.scores)
        probabilities[mine] = Calibration.fit(known, relevance)(test.scores[mine])
    return probabilities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation_size", type=float, default=0.02)
    options = parser.parse_args()
    data = load_xmc(options.data)
    data = hold_out(data, options.validation_size)
    for split in ("validation", "test"):
        if not has_labels(data, split):
            print(f"there are no {split} queries with labels, so nothing is fitted or measured.")
            return
    model = XMCModel.from_pretrained(options.model)
    votes = model.memory is not None
    if votes:  # the memory of a finished run also holds the validation queries
        settings, model.memory, model.calibration = model.memory.settings, None, None
        model.remember(data.train)
        model.memory.settings = settings
    known, tested = data.relevance("validation"), data.relevance("test")

    def search(split: str, k: int) -> TopK:
        return model.search(data.split(split)["text"][:], k, exclude=data.filter_pairs.get(split))

    def row(name: str, probabilities: np.ndarray, test: TopK) -> None:
        said, hits = scores_and_hits(TopK(test.label_ids, probabilities), tested)
        brier, error = np.mean((said - hits) ** 2), expected_calibration_error(said, hits)
        print(f"| {name} | {error:.3f} | {brier:.4f} | {len(np.unique(said)):,} |", flush=True)

    print("| calibration | ECE@5 | Brier score | different probabilities |\n|---|---|---|---|")
    for memory in [model.memory, None] if votes else [None]:
        model.memory = memory
        what = "labels and memory" if memory is not None else "labels"
        validation, test = search("validation", max(DEPTHS)), first(search("test", max(DEPTHS)), READ)
        for depth in DEPTHS:
            fitted = Calibration.fit(first(validation, depth), known)
            row(f"{what}, fitted on {depth} labels per text", fitted(test.scores), test)
        validation = first(validation, READ)
        row(f"{what}, plain isotonic regression", plain_isotonic(validation, known, test), test)
        for floor in FLOORS:
            probabilities = maps_of_frequent_labels(validation, known, test, floor)
            row(f"{what}, a map for each label with {floor} predictions", probabilities, test)


if __name__ == "__main__":
    main()
