"""What the subcommands do, apart from ``run``, for programs that call them. Bad input raises ``ScionError``; a return
value is an exit code."""

from core.cli.describe import describe
from core.cli.export import export, import_
from core.cli.merge import merge, merge_methods, save_library_model, save_plain
from core.cli.methods import methods
from core.cli.models import model_of, shapes_of
from core.cli.new_folder import check_free, new_folder
from core.cli.predict import data_of, predict
from core.cli.roles import role_table, roles

__all__ = ["check_free", "data_of", "describe", "export", "import_", "merge", "merge_methods", "methods", "model_of",
           "new_folder", "predict", "role_table", "roles", "save_library_model", "save_plain", "shapes_of"]
