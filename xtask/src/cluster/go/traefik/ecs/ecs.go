// Package ecs stands in for Traefik's provider of that name, which brings AWS' clients.
package ecs

import (
	"errors"

	"github.com/traefik/traefik/v3/pkg/config/dynamic"
	"github.com/traefik/traefik/v3/pkg/provider"
	"github.com/traefik/traefik/v3/pkg/safe"
)

// Provider can be named in settings, and then says that it is not there.
type Provider struct{}

var _ provider.Provider = (*Provider)(nil)

var errAbsent = errors.New("this Traefik is built without its provider for ECS")

// Init refuses.
func (*Provider) Init() error { return errAbsent }

// Provide refuses.
func (*Provider) Provide(chan<- dynamic.Message, *safe.Pool) error { return errAbsent }
