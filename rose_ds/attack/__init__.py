"""Automatic attacks on a trained classifier: accuracy under attack."""

from rose_ds.attack.classifier import Classifier
from rose_ds.attack.run import attack
from rose_ds.attack.searches import SEARCHES, Item, Outcome, deepwordbug, pruthi
from rose_ds.attack.settings import AttackSettings, PlannedAttack

__all__ = [
    "SEARCHES",
    "AttackSettings",
    "Classifier",
    "Item",
    "Outcome",
    "PlannedAttack",
    "attack",
    "deepwordbug",
    "pruthi",
]
