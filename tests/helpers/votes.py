"""The loss of votes, written as its formula, over a dense table of queries and labels."""

import torch


def mean_of_votes(queries, positives, weights=None, drawn=None, drawn_positives=()):
    """Return the loss of queries (B, D), with further voting queries (n, D) and lists of their labels."""
    voting = queries if drawn is None else torch.cat([queries, drawn])
    labels = [[int(label) for label in row if label >= 0] for row in positives] + [list(row) for row in drawn_positives]
    losses = []
    for query, row in enumerate(positives):
        others = [other for other in range(len(voting)) if other != query]
        cosines = torch.stack([torch.cosine_similarity(queries[query], voting[other], dim=0) for other in others])
        shares = (cosines / 0.07).softmax(0)
        total, mass = 0.0, 0.0
        for place, label in enumerate(row.tolist()):
            voters = [at for at, other in enumerate(others) if label in labels[other]]
            if label >= 0 and voters:
                weight = 1.0 if weights is None else float(weights[query, place])
                total, mass = total - weight * shares[voters].sum().log(), mass + weight
        losses.append(total / mass if mass else torch.zeros((), dtype=queries.dtype))
    return torch.stack(losses).mean()
