"""Trained models to hand on: ``write`` exports, ``install`` imports, ``load`` predicts with a portable model.

``description`` and ``foreign_plans`` say what the JSON files of a portable model may hold.
"""
