"""The best plan for an SLO file: what may be chosen, what is known of it without simulating, and which fleet wins.

    problem        the question: model, costs, cluster, targets, requests
    kinds          instances that memory and the model allow        limits   what none of a kind can exceed
    prefill_alone, decode_alone, colocated_alone                    quick models of one pool of equal instances
    curves         their attainment against rate                    predict  what fleets can be expected to reach
    fleet          instances of some kinds that serve together      room     what fits on which nodes, and where
    disaggregated, colocated, mixed, heterogeneous                  the fleets that are worth a name
    space          all of the above for one question
    best_first     the fleet of the highest goodput                 cheapest the cheapest fleet for a rate
    trial          full simulations, the last word                  trim     takes away what a fleet does not need
    verdict, runners_up, sensitivity, nearest, words                what is told of the answer
    parallel       work spread over cores

`placement.planner` puts them together.
"""
