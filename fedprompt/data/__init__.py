"""Data sets, partitions, and the federated view of both."""

from fedprompt.data.dataset import Dataset, Split, View
from fedprompt.data.federated import FederatedData, federate
from fedprompt.data.fingerprint import fingerprint
from fedprompt.data.heterogeneity import feature_distance, measures
from fedprompt.data.partitions.kinds import KINDS, PartitionOptions, partition
from fedprompt.data.registry import DatasetInfo, available, dataset, load
from fedprompt.data.sources import cifar, embedded, folders, idx  # noqa: F401  (register their data sets)

__all__ = [
    "KINDS",
    "Dataset",
    "DatasetInfo",
    "FederatedData",
    "PartitionOptions",
    "Split",
    "View",
    "available",
    "dataset",
    "feature_distance",
    "federate",
    "fingerprint",
    "load",
    "measures",
    "partition",
]
