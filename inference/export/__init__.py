"""Trained models as safetensors and JSON: written, moved, checked and predicted with, without pickle.

``description`` what ``model.json`` says · ``weights`` the safetensors files · ``checks`` plans and dataset.json from
elsewhere · ``write`` export · ``archive`` zip files · ``load`` into a predictor · ``install`` into nnU-Net's folders.
"""
