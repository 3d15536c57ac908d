// The API server of another version of Kubernetes than the cluster's, for what it says of manifests.
package main

import (
	"os"
	_ "time/tzdata"

	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() {
	// Called as the program that is all of Kubernetes: `PROGRAM kube-apiserver FLAGS`.
	os.Args = os.Args[1:]
	os.Exit(cli.Run(apiserver.NewAPIServerCommand()))
}
