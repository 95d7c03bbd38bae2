"""Data sets, partitions, and the federated view of both."""

from fedprompt.data.dataset import Dataset, Split, View
from fedprompt.data.federated import FederatedData, federate
from fedprompt.data.fingerprint import fingerprint
from fedprompt.data.heterogeneity import feature_distance, measures
from fedprompt.data.partitions.base import PartitionOptions
from fedprompt.data.partitions.registry import partition
from fedprompt.data.registry import DatasetInfo, available, dataset, load

__all__ = [
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
