"Adapt CLIP-like vision-language models to a task without a single human label"
__version__ = "0.1.0"

import importlib

_HOME = {
    "load_clip": "clip", "FrozenCLIP": "clip", "Compute": "clip", "zero_shot_head": "clip",
    "Task": "data", "read_class_names": "data", "read_templates": "data", "sample_task": "data", "ArrayImages": "data", "Augmentation": "data", "FileImages": "images",
    "task_from_folder": "images", "task_from_table": "images", "task_from_arrays": "images", "task_from_dataset": "images",
    "TASKS": "datasets", "load_task": "datasets", "register_task": "datasets", "DATASETS": "datasets",
    "DualPrompt": "prompts", "VisualPrompt": "adapters", "LoRA": "adapters", "Adapter": "adapters", "build_light_module": "adapters",
    "save_light_module": "adapters", "load_light_module": "adapters", "Schedule": "trainer",
    "Method": "protocol", "Fitted": "protocol", "Run": "protocol", "METHODS": "rivals", "get_method": "rivals",
    "CoFT": "collaborate", "CoFTPhase1": "collaborate", "CoFTPlus": "collaborate", "CoFTSemi": "collaborate", "CoFTPlusSemi": "collaborate", "CoFTX": "ours",
    "BlackBoxVLM": "blackbox", "Pictures": "blackbox", "BudgetExhausted": "blackbox", "RemoteBox": "server", "CraFT": "craft", "BBT": "craft", "craft_settings": "craft", "CoOp": "fewshot",
    "TipAdapter": "fewshot", "TipAdapterF": "fewshot", "LinearProbe": "fewshot", "tip_adapter_settings": "fewshot",
    "UPL": "pseudolabels", "FPL": "pseudolabels", "IFPL": "pseudolabels", "GRIP": "pseudolabels", "CPL": "pseudolabels", "cpl_settings": "pseudolabels",
    "FixMatch": "consistency", "FixMatchDA": "consistency", "LaFTer": "consistency", "TransCLIP": "transductive",
    "ZeroShot": "rivals", "ZeroShotEnsemble": "rivals", "TopK": "rivals", "Supervised": "rivals",
    "CoFTClassifier": "estimator", "CoFTPlusClassifier": "estimator", "CraFTClassifier": "estimator", "VLMClassifier": "estimator",
    "save_fitted": "saved", "load_fitted": "saved", "export_open_clip": "saved", "export_onnx": "saved", "push_saved": "saved", "pull_saved": "saved",
    "predict_folder": "adapt", "evaluate_folder": "adapt", "write_report": "report",
    "Parameters": "experiment", "run_experiment": "experiment", "run_variants": "experiment", "variants_table": "experiment", "published_table": "results",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'coft' has no attribute {name!r}; public are {', '.join(__all__)}")
    return getattr(importlib.import_module(f"coft.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
