"""Automatic attacks on a trained classifier: accuracy under attack."""

from rose_ds.attack.classifier import Classifier
from rose_ds.attack.run import AttackSettings, attack
from rose_ds.attack.searches import SEARCHES, Item, Outcome, deepwordbug, pruthi

__all__ = ["SEARCHES", "AttackSettings", "Classifier", "Item", "Outcome", "attack", "deepwordbug", "pruthi"]
