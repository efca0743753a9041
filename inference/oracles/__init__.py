"""Three independent judges of a filter: joint conditioning, NUTS, simulation.

None shares code with the derivation: each sees only the design model as a NumPyro program
(`DesignModel.sequence`) and what the filter under test claims.
"""
