"""Sweeps: the same run under many settings, as trials of Ray Tune or as lanes of one program. `config` says what a sweep file holds."""
