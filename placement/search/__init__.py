"""The search for the best deployment of an SLO file, from fast bounds to full simulations.

    problem                     the input: model, costs, cluster, targets, requests
    kinds, limits               instances that memory and the model allow; upper bounds of their rates
    prefill_model, decode_model, colocated_model
                                fast models of one group of equal instances
    group_attainment, predict   a group's attainment against rate; the predicted goodput of a deployment
    candidate, packing          deployments of groups of instances; their devices on the nodes
    enumeration, space          the deployments to evaluate; everything above for one problem
    best_first, cheapest        the deployment of the highest goodput; the cheapest deployment for a rate
    trial, trim                 full simulations; removal of instances that a deployment does not need
    final_comparison, finalists, rate_simulations, paired_runs, variants
                                the best deployments on the same requests
    chosen_deployment, sensitivity, nearest_feasible, candidate_list
                                results about the chosen deployment and its alternatives
    advice, changes, simulated_effects
                                what single changes of it, and the other layout, would serve
    mapper                      parallel execution

`placement.planner` combines these modules.
"""
