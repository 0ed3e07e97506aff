"""Ray's cluster launcher without SSH. It is the only user of the launcher's private names, as of Ray 2.60."""

from unittest import mock

from ray.autoscaler import tags
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import hash_launch_conf, prepare_config, validate_config


class Launcher:
    """Creates the nodes of a cluster file as `ray up` and the autoscaler do, but logs in to none."""

    def __init__(self, content):
        """Create what nodes need: role, key pair, security group and subnets."""
        prepared = prepare_config(content)
        validate_config(prepared)
        with mock.patch("ray.autoscaler._private.aws.config.time.sleep"):  # IAM takes seconds to spread, moto none
            self.config = _bootstrap_config(prepared, no_config_cache=True)
        self.provider = _get_node_provider(self.config["provider"], self.config["cluster_name"])
        # EC2 gives up to MaxCount instances; moto takes MinCount, for which Ray says 1.
        self.provider.ec2_fail_fast.meta.client.meta.events.register("provide-client-params.ec2.RunInstances", _all)

    def create(self, name, kind, count):
        """Create `count` nodes of a type. `kind` is `head` or `worker`."""
        node = self.config["available_node_types"][name]["node_config"]
        told = {tags.TAG_RAY_NODE_NAME: f"ray-{self.config['cluster_name']}-{kind}", tags.TAG_RAY_NODE_KIND: kind}
        told |= {tags.TAG_RAY_USER_NODE_TYPE: name, tags.TAG_RAY_NODE_STATUS: tags.STATUS_UNINITIALIZED}
        told[tags.TAG_RAY_LAUNCH_CONFIG] = hash_launch_conf(node, self.config["auth"])
        self.provider.create_node(node, told, count)

    def there(self):
        """Return the ids of the nodes that run."""
        return self.provider.non_terminated_nodes({})

    def terminate(self):
        """Terminate all nodes."""
        self.provider.terminate_nodes(self.there())


def _all(params, **_):
    return {**params, "MinCount": params["MaxCount"]}
