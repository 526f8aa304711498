"""The smallest methods of four kinds that the contract has to hold (tests/test_contract.py)."""
