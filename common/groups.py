"""Pictures that belong together: two faces of one illustration are nearly the same picture.

They are held out together, and drawn anew together where an interval is made.
"""

import numpy as np
import torch


def groups_of(split):
    """Numbers of the images' groups, (n,) i64: images of one illustration share a number."""
    names = split["header"].get("groups")
    return torch.from_numpy(numbered(names)) if names else torch.arange(len(split["labels"]))


def numbered(names):
    """A number for each name, in the order of the names, (n,) i64."""
    # numpy would give every name the room of the longest.
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], np.int64)


def hold_apart(groups, labels, share, seed=0):
    """The images that are held out for choices, (n,) bool: at most `share` of all, in whole groups.

    groups (n,) and labels (n,) of any kind. Two images of each class stay in the rest.
    """
    group_of = np.unique(np.asarray(groups), return_inverse=True)[1]
    label_of = np.unique(np.asarray(labels), return_inverse=True)[1]
    remaining = np.bincount(label_of)  # images of each class that stay
    held_out = np.zeros(len(label_of), bool)
    count, most = 0, share * len(label_of)
    ends = np.cumsum(np.bincount(group_of))
    members = np.split(np.argsort(group_of, kind="stable"), ends[:-1])  # images of each group
    # Whole groups, because two faces of one illustration are nearly the same picture. With one of them in
    # train, the other would be an easy question, and the choice would go to what remembers best.
    for group in np.random.default_rng(seed).permutation(len(members)):
        if count + 1 > most:
            break  # it is full; of a million groups, most need not be asked
        own = members[group]
        kinds, counts = np.unique(label_of[own], return_counts=True)
        if count + len(own) <= most and (remaining[kinds] - counts).min() > 1:
            held_out[own] = True
            remaining[kinds] -= counts
            count += len(own)
    return held_out
