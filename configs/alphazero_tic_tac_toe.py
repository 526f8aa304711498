"""AlphaZero plays itself in TicTacToe, of pgx."""
from algorithms import alphazero


def get_config():
    return alphazero.get_config()
