"""Many models on the same replicas: which request has to wait for its model to be loaded, the least recently used
leaving first.
"""

from collections import OrderedDict

import numpy as np

from tidegate.advisor.traffic import Floats, Traffic


def load_pattern(traffic: Traffic, resident_max: int, load_ms: float) -> Floats:
    """What loading adds to each request, in ms: 0 or `load_ms`. The first use of a model is a load too."""
    resident: OrderedDict[int, None] = OrderedDict()
    added = np.zeros(len(traffic))
    for i, model in enumerate(traffic.endpoint_of.tolist()):
        if model in resident:
            resident.move_to_end(model)
            continue
        added[i] = load_ms
        resident[model] = None
        if len(resident) > resident_max:
            resident.popitem(last=False)
    return added
